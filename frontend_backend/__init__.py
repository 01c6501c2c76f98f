"""The contracts between processes: rings, wire structures and messages. A leaf: it imports no sibling."""
