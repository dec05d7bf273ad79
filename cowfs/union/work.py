"""The work of a view that costs time: counted where it is done, on paths that are slow anyway."""

from __future__ import annotations

__all__ = ["Work"]


class Work:
    """Counts since the view was made.

    Owner: the view's thread; others may read.

    Attributes:
        copied_files, copied_bytes: files whose data was copied up (COW), and how much.
        copied_attributes: files, links and devices copied up without data.
        redirected_files, redirected_blocks: redirect files made, and blocks that they got (ROW).
        directories_read: directories whose names were read from layers or index.
    """

    __slots__ = (
        "copied_attributes",
        "copied_bytes",
        "copied_files",
        "directories_read",
        "redirected_blocks",
        "redirected_files",
    )

    def __init__(self) -> None:
        self.copied_files = self.copied_bytes = self.copied_attributes = 0
        self.redirected_files = self.redirected_blocks = 0
        self.directories_read = 0

    def told(self) -> dict[str, int]:
        """All of it, by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def copied(self, count: int) -> None:
        """A file's data was copied up."""
        self.copied_files += 1
        self.copied_bytes += count

    def copied_alone(self) -> None:
        """Something was copied up without data."""
        self.copied_attributes += 1

    def redirected(self) -> None:
        """A redirect file was made."""
        self.redirected_files += 1

    def redirected_more(self, blocks: int) -> None:
        """A redirect file got blocks."""
        self.redirected_blocks += blocks

    def read_directory(self) -> None:
        """The names of a directory were read."""
        self.directories_read += 1
