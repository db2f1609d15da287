"""The README's blocks of shell commands, run as they stand there."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def block(first_line: str) -> str:
    """The commands of the one block whose first line is the comment `# first_line...`."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(f"# {first_line}")]
    return f"set -e\n{found}"
