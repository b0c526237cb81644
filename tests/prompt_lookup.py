"""Prompt lookup by a search through the whole text."""


def searched(text: list[int], count: int) -> list[int]:
    """What stood behind the last 3 tokens when they came before for the last time, or else behind the last 2."""
    for size in (3, 2):
        for at in range(len(text) - 1, size - 1, -1):
            if text[at - size : at] == text[-size:]:
                found = list(text)
                while len(found) < len(text) + count:
                    found.append(found[at + len(found) - len(text)])
                return found[len(text) :]
    return []
