"""The mechanisms that flags exchange: losses, BatchNorm, MoCo v1, the memory bank. Each does what its paper says, learns,
resumes bit by bit, and is the same on one process and on two."""
import pytest
from conftest import METHODS, TINY


@pytest.mark.parametrize("method, flags, message", [
    ("simco", "--alpha 64", "--alpha is for --loss eqco, and this is --loss dual"),
    ("moco_v2", "--loss eqco", "--loss eqco needs --alpha"),
    ("moco_v2", "--dt-m 3", "--dt-m is for --loss dual, and this is --loss infonce"),
    ("simmoco", "--num-negatives 32", "a batch of 32 has 31 for each query at most"),
    ("simmoco", "--num-negatives 0", "must be a whole number of at least 1"),
])  # fmt: skip
def test_flags_that_make_no_sense_are_refused(method, flags, message, fails_plainly, tmp_path):
    assert message in fails_plainly(METHODS[method], *TINY, "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()
