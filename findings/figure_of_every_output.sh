#!/usr/bin/env bash
# jupyter-book 1.0.4.post1, myst-nb 1.4.0, matplotlib 3.11.1; seen 2026-11-28
#
# Expected: a cell with the metadata `mystnb: figure: {name, caption}` is one numbered figure, its image,
#           which {numref} finds by the name.
# Happens:  each output of the cell is a figure with that caption and the next number. After a plot without
#           a semicolon the printed list of lines is figure 1 and the picture is figure 2. Both claim the
#           name, so that neither has it: {numref} stays as the word "fig-plot", and the build succeeds.
# Output:
#   captions: Fig. 1 A plot. | Fig. 2 A plot.
#   reference: See fig-plot.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jupyter-book==1.0.4.post1 myst-nb==1.4.0 matplotlib==3.11.1 ipykernel==7.4.0
mkdir book
cat >book/_config.yml <<'YAML'
title: Figures
execute: {execute_notebooks: force}
sphinx: {config: {numfig: true}}
YAML
printf 'format: jb-book\nroot: page\n' >book/_toc.yml
cat >book/page.md <<'PAGE'
---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {name: python3, display_name: Python 3}
---
# Page

See {numref}`fig-plot`.

```{code-cell} ipython3
---
mystnb:
  figure: {name: fig-plot, caption: A plot.}
---
import matplotlib.pyplot as plt

plt.plot([1, 3, 2])
```
PAGE
PATH="$PWD/venv/bin:$PATH" venv/bin/jupyter-book build book >log 2>&1 || { cat log; exit 1; }
text() { sed 's/<[^>]*>//g; s/#$//' <<<"$1"; }
captions=$(grep -o '<span class="caption-number">.*' book/_build/html/page.html)
reference=$(grep -o '<p>See .*' book/_build/html/page.html)
echo "captions: $(text "$captions" | paste -sd '|' | sed 's/|/ | /')"
echo "reference: $(text "$reference")"
[ "$(text "$captions" | paste -sd '|')" = "Fig. 1 A plot.|Fig. 2 A plot." ]
[ "$(text "$reference")" = "See fig-plot." ]
