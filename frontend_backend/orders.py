"""What a manager orders of its instances: a word in each answer. Alone, for those who have no manager to talk to.

The messages that carry it are in `messages_instance`, which takes three times as long to load as swtpm takes to start.
"""

from enum import IntFlag


class Orders(IntFlag):
    """What the manager wants of an instance."""

    NONE = 0
    STOP = 1  # clean stop: TPM2_Shutdown(STATE), final commit, exit
    RESET = 2  # platform reset: load again, start up again
    HIBERNATE = 4  # if nothing speaks against it: save everything, hand connections over, exit
    QUOTE = 8  # ask by QuoteTask what is to be quoted; given only to instances whose reports say `quotes`
