"""What went wrong in a group of tasks, where it is one of the errors that were to be expected."""


def expected_error(
    group: BaseExceptionGroup[BaseException], kinds: type[Exception] | tuple[type[Exception], ...]
) -> BaseException | None:
    """Return the first error of `group` if all of them are of these kinds, None if any is not: then raise the group."""
    expected, others = group.split(kinds)
    if expected is None or others is not None:
        return None
    first: BaseException = expected
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
