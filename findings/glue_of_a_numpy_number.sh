#!/usr/bin/env bash
# jupyter-book 1.0.4.post1, myst-nb 1.4.0, numpy 2.4.6; seen 2026-11-28
#
# Expected: a number that a cell glues stands in the text as that number, rounded where the text asks.
# Happens:  a NumPy scalar, which is what every mean and median of an array is, stands there as
#           np.float64(0.26412), since it is glued by its repr and NumPy 2 changed that. With a format
#           nothing stands there, and the build succeeds with a warning.
# Output:
#   Python's: 0.26412, 0.264; NumPy's: np.float64(0.26412), nothing
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jupyter-book==1.0.4.post1 myst-nb==1.4.0 numpy==2.4.6 ipykernel==7.4.0
mkdir book
cat >book/_config.yml <<'YAML'
title: Numbers
execute: {execute_notebooks: force}
YAML
printf 'format: jb-book\nroot: page\n' >book/_toc.yml
cat >book/page.md <<'PAGE'
---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {name: python3, display_name: Python 3}
---
# Page

```{code-cell} ipython3
import numpy as np
from myst_nb import glue

glue("python", 0.26412, display=False)
glue("numpy", np.array([0.26412]).mean(), display=False)
```

Python's: {glue:text}`python`, {glue:text}`python:.3f`; NumPy's: {glue:text}`numpy`, {glue:text}`numpy:.3f`.
PAGE
PATH="$PWD/venv/bin:$PATH" venv/bin/jupyter-book build book >log 2>&1 || { cat log; exit 1; }
text=$(grep -o "Python.s: .*" book/_build/html/page.html | sed 's/<[^>]*>//g')
echo "$text"
grep -q "0.26412, 0.264; NumPy.s: np.float64(0.26412), \.$" <<<"$text"
