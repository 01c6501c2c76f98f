"""Words of a command line to options, by the rules of GNU's getopt_long, which swtpm uses. Pure.

The standard library's module of that name loads the translations' machinery, which a TPM that starts in a few
milliseconds should not wait for.
"""

from collections.abc import Mapping, Sequence

from frontend_backend.swtpm_suboptions import OptionError

Options = list[tuple[str, str | None]]


def getopt_long(
    words: Sequence[str], interface: str, long: Mapping[str, str], short: Mapping[str, str]
) -> tuple[Options, list[str]]:
    """Return (long name, argument) for each option in order, and the words that are none.

    `long`: "none", "needed" or "maybe" an argument, by name; `short`: long names by letter. An unambiguous beginning of
    a long name is enough, options may follow words, and `--` ends them.

    Raises:
        OptionError: an unknown or ambiguous option, a missing argument, or one too many.

    """
    options: Options = []
    others: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            return options, others + waiting
        if word.startswith("--"):
            options.append(_long(word, waiting, interface, long))
        elif word.startswith("-") and word != "-":
            options += _short(word[1:], waiting, interface, long, short)
        else:
            others.append(word)
    return options, others


def _long(word: str, waiting: list[str], interface: str, long: Mapping[str, str]) -> tuple[str, str | None]:
    given, equals, value = word[2:].partition("=")
    names = [given] if given in long else [name for name in long if name.startswith(given)]
    if not names:
        raise OptionError(f"{interface}: unrecognized option '--{given}'", usage=True)
    if len(names) > 1:
        candidates = " ".join(f"'--{name}'" for name in names)
        raise OptionError(f"{interface}: option '--{given}' is ambiguous; possibilities: {candidates}", usage=True)
    name = names[0]
    if equals:
        if long[name] == "none":
            raise OptionError(f"{interface}: option '--{name}' doesn't allow an argument", usage=True)
        return name, value
    if long[name] != "needed":
        return name, None
    if not waiting:
        raise OptionError(f"{interface}: option '--{name}' requires an argument", usage=True)
    return name, waiting.pop(0)


def _short(
    letters: str, waiting: list[str], interface: str, long: Mapping[str, str], short: Mapping[str, str]
) -> Options:
    options: Options = []
    for position, letter in enumerate(letters):
        name = short.get(letter)
        if name is None:
            raise OptionError(f"{interface}: invalid option -- '{letter}'", usage=True)
        if long[name] != "needed":
            options.append((name, None))
            continue
        rest = letters[position + 1 :]
        if not rest and not waiting:
            raise OptionError(f"{interface}: option requires an argument -- '{letter}'", usage=True)
        options.append((name, rest or waiting.pop(0)))
        break
    return options
