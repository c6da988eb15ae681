from pathlib import Path

import pytest
import torch

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """The real data sets, where they lie beside the checkout."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real data sets do not lie in ../shared/data beside the checkout")
    return REAL_DATA


@pytest.fixture
def global_generator_untouched():
    """Fails the test where anything was drawn from torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)
