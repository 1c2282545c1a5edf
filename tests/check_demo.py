"""python tests/check_demo.py FILE, where FILE is what `./run_all.sh demo` printed: fails unless its
table shows each method above the untrained network, by 15 points in linear top-1 and 10 in kNN."""
import re
import sys

# method | flags | batch | linear | probe | kNN | seeds
row = r"^\| (.*?) \| .* \| \d+ \| ([\d.]+) \| [\d.–]+ \| ([\d.]+) \| 1 \|$"
figures = {name: row for name, *row in re.findall(row, open(sys.argv[1]).read(), re.MULTILINE)}
floor = [float(x) for x in figures.pop("untrained")]
assert len(figures) == 3, figures
for name, values in figures.items():
    linear, knn = (float(x) - low for x, low in zip(values, floor))
    print(f"{name}: linear {linear:.2f} and kNN {knn:.2f} points above the untrained network")
    assert linear >= 15 and knn >= 10, name
