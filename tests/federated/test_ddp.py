"""Two processes on the CPU run a federation together: equal models, and only the first writes.

Slow because each process imports the stack. A deadlock shows as a timeout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_med.data import Phantoms

PROGRAM = """
import os, sys
sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads(1)
import lightning as L
from conftest import Hospitals, adam, distilled, network, student, teacher_stage, trainer, weights
from fkd_med.data import FederatedDataModule
from fkd_med.aggregation import LogitConsensus, Scaffold
from fkd_med.federated import EnsembleTeachers, FedDF, FedProx, Federation, PublicDigest, ScaffoldRule
from fkd_med.losses import HintMSE, LogitKL, Ramp
from fkd_med.modules import MutualDistillationModule

rank = int(os.environ.get("LOCAL_RANK", 0))
L.seed_everything(7, verbose=False)
root = {root!r}
written = []
def spy(event, arguments):
    if event == "open" and str(arguments[0]).startswith(root) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        written.append(str(arguments[0]))
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(arguments[0]).startswith(root):
        written.append(f"{{event}} {{arguments[0]}}")

sys.addaudithook(spy)

def run(name, module, rounds=2, ckpt=None, **recipe):
    options, recipe_data = recipe.pop("trainer", {{}}), recipe.pop("data", None)
    made = trainer(
        __import__("pathlib").Path(root) / name, Federation(rounds=rounds, **recipe), strategy="ddp", devices=2,
        **options,
    )
    data = recipe_data or Hospitals({{"a": 8, "b": 16, "c": 24}})
    made.fit(module, datamodule=data, ckpt_path=ckpt)
    state, own = weights(module), module.personal.by_client
    state |= {{f"own-{{client}}/{{name}}": tensor for client in own for name, tensor in own[client].items()}}
    before = len(written)
    torch.save(state, f"{{root}}/{{name}}-{{os.environ['LOCAL_RANK']}}.pt")
    del written[before:]
    return made

run("plain", student())
run("keep", student(), optimizer_state="keep", fraction=0.5)
run("resumed", student(), rounds=1)
run("resumed", student(), rounds=2, ckpt=f"{{root}}/resumed/checkpoints/last.ckpt")
run("alone", student(), aggregator=None)
rules = {{"aggregator": Scaffold(), "client_rules": [ScaffoldRule()], "batch_norm": "local"}}
plain = lambda parameters: torch.optim.SGD(parameters, lr=0.05)
run("scaffold", student(optimizer=plain), **rules)
run("prox", student(), client_rules=[FedProx(1.0)], frozen=["network.0.bias"])
public = lambda: Hospitals({{"a": 8, "b": 16, "c": 24}}, public=6)
run("feddf", student(), data=public(), server_distillation=FedDF(steps=3, batch_size=4))
talk = {{"aggregator": LogitConsensus(), "client_rules": [PublicDigest(batch_size=4)], "share_logits": True}}
run("fedmd", student(), data=public(), **talk)
run("unseen", student(), trainer={{"limit_val_batches": 0}})
stage = teacher_stage(f"{{root}}/teachers", epochs=1)
run("taught", distilled(None, source=stage), rounds=1)
run("again", distilled(None, source=teacher_stage(f"{{root}}/teachers", epochs=1)), rounds=1)
shared = EnsembleTeachers(teacher_stage(f"{{root}}/teachers", epochs=1))
run("ensemble", distilled(None, source=shared), rounds=1, share_teachers=True)
run("trial", distilled(None, source=stage), trainer={{"fast_dev_run": True}})
losses = {{"kd": LogitKL(), "hint": HintMSE(student_tap="1", teacher_tap="2")}}
phantoms = FederatedDataModule(f"{{root}}/phantoms", image_size=16, batch_size=4, seed=3)
cached = distilled(None, source=teacher_stage(f"{{root}}/cached", epochs=1), losses=losses, teacher_cache="taps")
run("cached", cached, data=phantoms)
views = distilled(None, source=teacher_stage(f"{{root}}/cached", epochs=1), teacher_cache="logits", teacher_views=8)
run("views", views, data=phantoms)
fading = {{"kd": LogitKL(), "hint": HintMSE(student_tap="1", teacher_tap="2", schedule=Ramp())}}
fade = distilled(None, source=teacher_stage(f"{{root}}/cached", epochs=1), losses=fading, teacher_cache="taps")
run("fade", fade, data=FederatedDataModule(f"{{root}}/phantoms", image_size=16, batch_size=2, seed=3))
noted = {{}}
class Note(L.Callback):
    def on_train_end(self, trainer, pl_module):
        fits = len(noted) // 11
        noted.update({{f"{{fits}}-{{name}}": t for name, t in pl_module.companions.tensors().items()}})
    def __deepcopy__(self, memo):
        return self

both = {{"kd": LogitKL(), "hint": HintMSE(student_tap="1", teacher_tap="2", schedule=Ramp())}}
untrained = teacher_stage(f"{{root}}/untrained", epochs=0)
mutual = MutualDistillationModule(network(), teacher=untrained, losses=both, optimizer=adam, teacher_lr=0.01)
run("mutual", mutual, optimizer_state="keep", client_callbacks=[Note()])
before = len(written)
torch.save(noted, f"{{root}}/companions-{{os.environ['LOCAL_RANK']}}.pt")
del written[before:]
open(f"{{root}}/written-{{os.environ['LOCAL_RANK']}}", "w").write("\\n".join(written))
"""


@pytest.mark.slow
def test_two_processes_hold_one_model(tmp_path) -> None:
    Phantoms(hospitals=2, images=16, size=32).prepare(tmp_path / "phantoms")
    script = tmp_path / "run.py"
    script.write_text(PROGRAM.format(folder=str(Path(__file__).parent), root=str(tmp_path)))
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "PL_GLOBAL_SEED")}
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    runs = (
        "plain keep resumed alone scaffold prox feddf fedmd unseen taught again ensemble trial cached views fade mutual"
    )
    for name in [*runs.split(), "companions"]:
        one, other = (load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
        moved = any(not torch.equal(value, START[key]) for key, value in one.items() if key in START)
        assert moved or name in ("alone", "fedmd", "companions"), name
    held = load(tmp_path / "companions-0.pt")
    kernels = {float(tensor.sum()) for key, tensor in held.items() if key.endswith("teacher.0.weight")}
    assert len(held) == 6 * 11 and len(kernels) == 6  # three clients, two rounds; each teacher its own
    assert any(key.startswith("own-a/") for key in load(tmp_path / "alone-0.pt"))
    assert any(key.startswith("own-a/") for key in load(tmp_path / "fedmd-0.pt"))
    plain, resumed = load(tmp_path / "plain-0.pt"), load(tmp_path / "resumed-0.pt")
    assert all(torch.equal(plain[key], resumed[key]) for key in plain)
    taught, again = load(tmp_path / "taught-0.pt"), load(tmp_path / "again-0.pt")
    assert all(torch.equal(taught[key], again[key]) for key in taught)
    notes = (tmp_path / "written-1").read_text().splitlines()
    assert [note for note in notes if not note.endswith(("run.py", "written-1"))] == []
    assert len((tmp_path / "written-0").read_text().splitlines()) > 20  # the spy sees what is written
    shared = [line for line in (tmp_path / "ensemble" / "ledger.csv").read_text().splitlines() if ",teacher," in line]
    assert len(shared) == 3 + 6  # up and down, by the first process alone
    ensemble = load(tmp_path / "ensemble-0.pt")
    assert any(not torch.equal(taught[key], ensemble[key]) for key in taught)
    for name in ("images.csv", "metrics.csv", "ledger.csv"):
        lines = (tmp_path / "plain" / name).read_text().splitlines()
        assert len(lines) == len(set(lines)) > 1, name  # nothing twice
    images = (tmp_path / "plain" / "images.csv").read_text().splitlines()[1:]
    assert len(images) == 2 * 9  # rounds x validation images, though the sampler pads 3 to 4
    assert not list((tmp_path / "plain" / "journal").glob("*"))
    assert len(list((tmp_path / "teachers").glob("*/teacher.safetensors"))) == 6  # three real, three of the trial run
    assert not list(tmp_path.glob("*fast-dev-run*"))


def load(path: Path) -> dict[str, Any]:
    stored: dict[str, Any] = torch.load(path, weights_only=True)
    return stored


START: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _remember_start(fed) -> None:
    START.update(fed.weights(fed.student()))
