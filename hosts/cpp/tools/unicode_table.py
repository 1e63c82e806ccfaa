"""Writes the Unicode tables that the tokenizer needs: `python unicode_table.py FOLDER`.

Run by hand, when the tokenizers package moves to a newer Unicode. `unicode_table.inc` is the general category
of every code point, as that package sees it; `unicode_canonical.inc` and `unicode_combining.inc` hold canonical
decompositions and combining classes, of the characters that it knows to have them.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

# fmt: off
NAMES = (
    "Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps",
    "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cs",
)
# fmt: on
LAST = 0x110000
NFD = normalizers.NFD()
SURROGATES = range(0xD800, 0xE000)


def categories() -> list[int]:
    """Return the category of every code point, as an index into NAMES."""
    points = [point for point in range(LAST) if point not in SURROGATES]
    text = "".join(map(chr, points))
    found = [NAMES.index("Cs") if point in SURROGATES else 0 for point in range(LAST)]
    for index, name in enumerate(NAMES[1:-1], start=1):
        pattern = Regex(rf"\p{{{name}}}")
        isolated, removed = pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.Split(pattern, "removed")
        for piece, (start, end) in isolated.pre_tokenize_str(text):
            # A piece of one character may also be what stood between two matches.
            if end - start == 1 and not removed.pre_tokenize_str(piece):
                found[points[start]] = index
    return found


def runs(found: list[int]) -> list[str]:
    """Return `{first,category},` for each run of equal categories."""
    starts = [point for point in range(LAST) if point == 0 or found[point] != found[point - 1]]
    return [f"{{{point},{found[point]}}}," for point in starts]


def decompositions() -> list[str]:
    """Return `{composed,first,second,composes},` for each canonical decomposition but Hangul's."""
    rows = []
    for point in range(LAST):
        parts = unicodedata.decomposition(chr(point)).split()
        # The package's tables may be older than this Python's.
        if not parts or parts[0].startswith("<") or NFD.normalize_str(chr(point)) == chr(point):
            continue
        first, second = int(parts[0], 16), int(parts[1], 16) if len(parts) > 1 else 0
        composes = second and unicodedata.normalize("NFC", chr(first) + chr(second)) == chr(point)
        rows.append(f"{{{point},{first},{second},{int(bool(composes))}}},")
    return rows


def combining() -> list[str]:
    """Return `{first,last,class},` for each run of code points of one combining class above 0."""
    rows: list[tuple[int, int, int]] = []
    for point in range(LAST):
        value = unicodedata.combining(chr(point))
        if value and not _is_ordered(chr(point), value):
            continue
        if value and rows and rows[-1][1] == point - 1 and rows[-1][2] == value:
            rows[-1] = (rows[-1][0], point, value)
        elif value:
            rows.append((point, point, value))
    return [f"{{{first},{last},{value}}}," for first, last, value in rows]


def _is_ordered(mark: str, value: int) -> bool:
    """Return whether the package moves a mark past another one of a greater class, or another one past it."""
    text = f"a{mark}\u0323" if value > 220 else f"a\u0301{mark}"
    return bool(NFD.normalize_str(text) != text)


def as_lines(items: list[str], name: str) -> str:
    """Return a table's text: a dozen entries a line."""
    lines = ["".join(items[start : start + 12]) for start in range(0, len(items), 12)]
    return "\n".join([name, *lines]) + "\n"


def main() -> None:
    """Write the tables into a folder."""
    folder = Path(sys.argv[1])
    title = f"// General categories by tokenizers {tokenizers.__version__}; made by tools/unicode_table.py."
    (folder / "unicode_table.inc").write_text(as_lines(runs(categories()), title), encoding="utf-8")
    title = f"// Canonical decompositions of Unicode {unicodedata.unidata_version}; made by tools/unicode_table.py."
    (folder / "unicode_canonical.inc").write_text(as_lines(decompositions(), title), encoding="utf-8")
    title = f"// Combining classes of Unicode {unicodedata.unidata_version}; made by tools/unicode_table.py."
    (folder / "unicode_combining.inc").write_text(as_lines(combining(), title), encoding="utf-8")


if __name__ == "__main__":
    main()
