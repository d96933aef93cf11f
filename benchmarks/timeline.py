"""Runs the demo, and draws its output as the timeline of the README: benchmarks/timeline.svg."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PICTURE = Path(__file__).with_suffix(".svg")
LEFT, SECOND, TOP, ROW, BAR = 110, 160, 36, 44, 28  # pixels
INK, WORK, WASTE = "#767676", "#2da44e", "#e0743a"  # each legible on white and on black


def main() -> None:
    """Measure and draw."""
    output = subprocess.run([sys.executable, "-m", "cancelonleave"], check=True, capture_output=True, text=True).stdout
    disconnect = re.search(r"the client \w+ at (\S+) s", output)
    runs = re.findall(r"^(plain|decorated) +(\S+) s .* (\d+ rows .+)$", output, re.MULTILINE)
    assert disconnect
    PICTURE.write_text(draw(float(disconnect[1]), [(name, float(end), rows) for name, end, rows in runs]))


def draw(disconnect: float, runs: list[tuple[str, float, str]]) -> str:
    """Return the picture of the runs; each has a name, the seconds until its end, and what happened to its rows."""
    bottom = TOP + ROW * len(runs)
    x = LEFT + disconnect * SECOND
    shapes = [text(LEFT + second * SECOND, bottom + 20, f"{second} s", "middle") for second in range(4)]
    for index, (name, end, rows) in enumerate(runs):
        y = TOP + ROW * index
        width = (end - disconnect) * SECOND
        shapes.append(text(LEFT - 10, y + 20, name, "end"))
        shapes.append(f'<rect x="{LEFT}" y="{y}" width="{disconnect * SECOND:.0f}" height="{BAR}" fill="{WORK}"/>')
        shapes.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{WASTE}"/>')
        late = f"{(end - disconnect) * 1000:.0f} ms" if end - disconnect < 1 else f"{end - disconnect:.1f} s"
        shapes.append(text(x + width + 10, y + 20, f"ran on for {late}, {rows}"))
    shapes.append(
        f'<path d="M{x:.0f} {TOP - 10}V{bottom - 8}" stroke="{INK}" stroke-width="2" stroke-dasharray="4 3"/>'
    )
    shapes.append(text(x, TOP - 16, "the client disconnects", "middle"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {bottom + 30}" font-family="sans-serif" '
    return "\n".join([f'{head}font-size="17" fill="{INK}">', *shapes, "</svg>\n"])


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Return a line of text."""
    return f'<text x="{x:.0f}" y="{y}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
