"""What a command's error output says besides progress bars."""

import re

BAR = re.compile(r"\[[\d:]+(<|, )")  # [elapsed<left, or [elapsed, rate


def messages(errors: str) -> list[str]:
    """Its lines, without empty ones and progress bars, whatever their unit or speed."""
    return [line for line in re.split(r"[\r\n]+", errors) if line.strip() and not BAR.search(line)]
