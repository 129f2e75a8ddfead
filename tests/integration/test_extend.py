"""An objective of the user's own, and paths that only larger machines take, as far as they can run here."""

import json
from pathlib import Path

import pytest
from conftest import ForkServer, losses

pytestmark = pytest.mark.integration

PLUGIN = '''
from dataclasses import dataclass
import torch
from verl_dft.objectives import TokenBatch, TokenLoss, token_loss

@dataclass(frozen=True)
class Confident:
    """Train only on tokens the model already gives a probability of at least tau."""
    tau: float = 0.5
    requires = frozenset()

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        keep = batch.logp.detach().exp() >= self.tau
        return token_loss(batch, -batch.logp, keep.float(), changed=~keep, kept_frac=keep.float())
'''


def test_an_objective_from_the_users_folder_trains(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_losses.py").write_text(PLUGIN)
    argv = [
        "train",
        "objective._target_=my_losses.Confident",
        "objective.tau=0.01",
        f"model={small_model}",
        f"data={uneven_rows}",
        f"data.cache_dir={cache_dir}",
        "data.max_length=256",
        "data.train_batch_size=8",
        "trainer.total_training_steps=2",
        "trainer.logger=[]",
        f"output_dir={tmp_path / 'run'}",
    ]
    ranks.ok(argv, call="verl_dft.cli:main", cwd=tmp_path)
    kept = losses(tmp_path / "run", "train/kept_frac")
    assert len(kept) == 2 and all(0 < value < 1 for value in kept)
    assert losses(tmp_path / "run", "train/changed_frac")[0] == pytest.approx(1 - kept[0])


def test_the_logits_hook_on_sequence_parallel_shards(ranks: ForkServer, tmp_path: Path) -> None:
    """Attention itself needs flash attention; the alignment of labels with shards does not."""
    out = tmp_path / "logp.json"
    ranks.ok([str(out)], world=2, call="probes:sequence_parallel_hook")
    found = json.loads(out.read_text())
    assert found["joined"] == pytest.approx(found["whole"], abs=1e-6)
    assert sum(value != 0 for value in found["whole"]) == 10  # 13 tokens, 3 rows: the first of each is not trained on
