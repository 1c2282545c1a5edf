"""python tests/check_demo.py FILE: FILE is what `./run_all.sh demo` printed. Exits with an error unless its table shows each
method's linear top-1 at least 20 points above the untrained network's."""
import re
import sys

text = open(sys.argv[1], encoding="utf-8").read()
figures = {name: float(value) for name, value in re.findall(r"^\| (\S.*?) \| ([\d.]+) /", text, re.MULTILINE)}
floor = figures.pop("untrained")
assert len(figures) == 3, figures
for name, value in figures.items():
    assert value >= floor + 20, f"{name}: {value} is not 20 points above the untrained network's {floor}"
    print(f"{name}: {value:.2f}, {value - floor:.2f} points above the untrained network")
