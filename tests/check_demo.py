"""python tests/check_demo.py FILE, where FILE is what `./run_all.sh demo` printed: fails unless its
table shows each method's linear top-1 at least 20 points above the untrained network's."""
import re
import sys

# method | flags | batch | linear | probe | kNN | seeds
row = r"^\| (.*?) \| .* \| \d+ \| ([\d.]+) \| [\d.–]+ \| [\d.]+ \| 1 \|$"
rows = re.findall(row, open(sys.argv[1]).read(), re.MULTILINE)
figures = {name: float(value) for name, value in rows}
floor = figures.pop("untrained")
assert len(figures) == 3, figures
for name, value in figures.items():
    print(f"{name}: {value:.2f}, {value - floor:.2f} points above the untrained network")
    assert value >= floor + 20, name
