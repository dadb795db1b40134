"""The keys that end an attachment and leave the container running. Source: docker documentation, "docker attach"."""

from __future__ import annotations

from ..errors import UsageError

DEFAULT = "ctrl-p,ctrl-q"
_CONTROL = {"@": 0, "[": 27, "\\": 28, "]": 29, "^": 30, "_": 31, **{chr(97 + n): n + 1 for n in range(26)}}


class DetachKeys:
    """Looks for a sequence such as `ctrl-p,ctrl-q` or `a,ctrl-c` in what is typed. Raises UsageError."""

    def __init__(self, words: str = "") -> None:
        self._keys = bytes(_key(word) for word in (words or DEFAULT).split(","))
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """(what is to be passed on, whether the sequence is complete). A beginning of it is held back."""
        text = self._held + data
        found = text.find(self._keys)
        if found >= 0:
            return text[:found], True
        for length in range(min(len(self._keys) - 1, len(text)), 0, -1):
            if text.endswith(self._keys[:length]):
                self._held = text[-length:]
                return text[:-length], False
        self._held = b""
        return text, False


def _key(word: str) -> int:
    if len(word) == 1 and ord(word) < 128:
        return ord(word)
    kind, _, letter = word.partition("-")
    if kind.lower() != "ctrl" or letter.lower() not in _CONTROL:
        raise UsageError(f"Unknown character: '{word}' in the detach keys")
    return _CONTROL[letter.lower()]
