"""`python -m starter.train STAGE`: train one stage from its last checkpoint on, or `export` what there is.

Order: clip and autoencoder (in any order), generator (needs both), judge, export.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from starter.train.autoencoder import AutoencoderStage
from starter.train.clip import JUDGE, RETRIEVER, ClipShape, ClipStage
from starter.train.dataset import load_dataset
from starter.train.export import export_clip, export_generator, replace_folder
from starter.train.generator import GeneratorStage
from starter.train.loop import Plan, Stage, best_checkpoint, load_checkpoint, train
from starter.train.plot import plot_losses
from starter.train.texts import vocabulary_texts
from starter.train.tokens import learn_tokenizer, load_tokenizer

VOCAB_SIZE = 5000
AnyStage = TypeVar("AnyStage", bound=Stage)
MODELS = Path(__file__).parents[1] / "models"


def clip(folder: Path, shape: ClipShape = RETRIEVER, name: str = "clip") -> ClipStage:
    dataset = load_dataset()
    tokenizer_folder = folder / "tokenizer"
    if not tokenizer_folder.exists():
        tokenizer = learn_tokenizer(vocabulary_texts(dataset.samples), vocab_size=VOCAB_SIZE)
        tokenizer.save_pretrained(str(tokenizer_folder))
    return ClipStage(dataset, load_tokenizer(tokenizer_folder), shape, name=name)


def judge(folder: Path) -> ClipStage:
    return clip(folder, JUDGE, "judge")


def autoencoder(folder: Path) -> AutoencoderStage:
    return AutoencoderStage(load_dataset())


def generator(folder: Path) -> GeneratorStage:
    """Needs the best CLIP and autoencoder in `folder`, which stay as they are from now on."""
    retriever, pixels = trained(clip(folder), folder), trained(autoencoder(folder), folder)
    return GeneratorStage(retriever.dataset, retriever.module, retriever.tokenizer, pixels.module)


STAGES: dict[str, Callable[[Path], Stage]] = {
    "clip": clip,
    "judge": judge,
    "autoencoder": autoencoder,
    "generator": generator,
}


def trained(stage: AnyStage, folder: Path) -> AnyStage:
    """The stage with the best weights there are for it."""
    checkpoint = best_checkpoint(folder / stage.name)
    if load_checkpoint(stage, checkpoint) == 0:
        raise FileNotFoundError(f"{checkpoint}: train {stage.name} first")
    stage.module.eval()
    return stage


def export(folder: Path, out: Path) -> None:
    """Write clip/, judge/ and generator/ into `out`, each replaced as a whole."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as partial:
        for name in ("clip", "judge"):
            if best_checkpoint(folder / name).exists():
                stage = trained(clip(folder) if name == "clip" else judge(folder), folder)
                export_clip(stage.module, stage.shape, stage.tokenizer, Path(partial) / name)
                replace_folder(Path(partial) / name, out / name)
        if best_checkpoint(folder / "generator").exists():
            painter = trained(generator(folder), folder)
            export_generator(painter, Path(partial) / "generator")
            replace_folder(Path(partial) / "generator", out / "generator")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "export"])
    parser.add_argument("--folder", type=Path, default=Path("var/training"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=MODELS, help="where `export` writes")
    parser.add_argument("--steps", type=int, default=0, help="stop when the stage has this many in all")
    parser.add_argument("--cooldown", type=int, default=0, help="then decay the rate for this many steps")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="or stop after this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.stage == "export":
        export(arguments.folder, arguments.out)
        return
    stage = STAGES[arguments.stage](arguments.folder)
    plan = Plan(steps=arguments.steps, cooldown=arguments.cooldown, minutes=arguments.minutes)
    train(stage, arguments.folder / stage.name, plan)
    plot_losses(arguments.folder / stage.name)


if __name__ == "__main__":
    main()
