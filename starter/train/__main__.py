"""`python -m starter.train STAGE`: train one stage from its last checkpoint on, or `all`, or `export`, or `measure`.

`adopt` makes checkpoints of the models that were exported, to go on from where no others are.

Order: clip and autoencoder (in any order), then queries (needs clip) and generator (needs both), judge, export.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from starter.train.adapter import join_adapter
from starter.train.autoencoder import AutoencoderStage
from starter.train.clip import JUDGE, RETRIEVER, ClipShape, ClipStage, image_vectors
from starter.train.dataset import load_dataset
from starter.train.export import export_clip, export_generator, replace_folder
from starter.train.generator import GeneratorStage
from starter.train.loop import CHECKPOINT, Plan, Stage, best_checkpoint, load_checkpoint, save_checkpoint, train
from starter.train.measure import NONSENSE, recall, reconstruction_psnr, similarity_ranges, text_vectors
from starter.train.plot import plot_losses
from starter.train.queries import QueryStage
from starter.train.texts import vocabulary_texts
from starter.train.tokens import learn_tokenizer, load_tokenizer

VOCAB_SIZE = 5000
AnyStage = TypeVar("AnyStage", bound=Stage)
MODELS = Path(__file__).parents[1] / "models"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def clip(folder: Path, shape: ClipShape = RETRIEVER, name: str = "clip") -> ClipStage:
    dataset = load_dataset()
    tokenizer_folder = folder / "tokenizer"
    if not tokenizer_folder.exists():
        tokenizer = learn_tokenizer(vocabulary_texts(dataset.samples), vocab_size=VOCAB_SIZE)
        tokenizer.save_pretrained(str(tokenizer_folder))
    return ClipStage(dataset, load_tokenizer(tokenizer_folder), shape, name=name)


def judge(folder: Path) -> ClipStage:
    return clip(folder, JUDGE, "judge")


def queries(folder: Path) -> QueryStage:
    """Needs the best CLIP in `folder`; trains a copy of it, so that the generator's text encoder stays as it was."""
    retriever = trained(clip(folder), folder)
    return QueryStage(retriever.dataset, retriever.module, retriever.tokenizer)


def autoencoder(folder: Path) -> AutoencoderStage:
    return AutoencoderStage(load_dataset())


def generator(folder: Path, *, compiled: bool = False) -> GeneratorStage:
    """Needs the best CLIP and autoencoder in `folder`, which stay as they are from now on."""
    retriever, pixels = trained(clip(folder), folder), trained(autoencoder(folder), folder)
    return GeneratorStage(retriever.dataset, retriever.module, retriever.tokenizer, pixels.module, compiled=compiled)


RECIPE: dict[str, tuple[int, int]] = {
    "clip": (740, 240),
    "autoencoder": (2200, 650),
    "queries": (1150, 150),
    "generator": (6_000, 1_500),
    "judge": (700, 200),
}
"""Stage -> steps at the constant rate, steps of cool-down, in the order in which they need each other."""

STAGES: dict[str, Callable[[Path], Stage]] = {
    "clip": clip,
    "queries": queries,
    "judge": judge,
    "autoencoder": autoencoder,
    "generator": partial(generator, compiled=True),
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
    with tempfile.TemporaryDirectory(dir=out) as new:
        retriever = trained(queries(folder), folder)
        export_clip(retriever.module, RETRIEVER, retriever.tokenizer, Path(new) / "clip")
        replace_folder(Path(new) / "clip", out / "clip")
        if best_checkpoint(folder / "judge").exists():
            second = trained(judge(folder), folder)
            export_clip(second.module, JUDGE, second.tokenizer, Path(new) / "judge")
            replace_folder(Path(new) / "judge", out / "judge")
        if best_checkpoint(folder / "generator").exists():
            painter = trained(generator(folder), folder)
            export_generator(painter, Path(new) / "generator")
            replace_folder(Path(new) / "generator", out / "generator")


def adopt(models: Path, folder: Path) -> None:
    """Write checkpoints into `folder` that hold the weights of `models`: training goes on from what was exported.

    What an export leaves out begins anew: the optimisers' states, and float32's last digits.
    """
    if (folder / "clip").exists():
        raise FileExistsError(f"{folder} holds checkpoints already")
    load_tokenizer(models / "clip").save_pretrained(str(folder / "tokenizer"))
    retriever = clip(folder)
    retriever.module.load_state_dict(weights(models / "clip" / "open_clip_model.safetensors"))
    write_checkpoint(retriever, folder)
    write_checkpoint(queries(folder), folder)
    second = judge(folder)
    second.module.load_state_dict(weights(models / "judge" / "open_clip_model.safetensors"))
    write_checkpoint(second, folder)
    parts = models / "generator"
    pixels = autoencoder(folder)
    pixels.module.load_state_dict(weights(parts / "vae" / DIFFUSERS_WEIGHTS))
    write_checkpoint(pixels, folder)
    painter = generator(folder)
    adapter = weights(parts / "ip_adapter" / "ip_adapter.safetensors")
    painter.average = join_adapter(weights(parts / "unet" / DIFFUSERS_WEIGHTS), adapter, painter.unet)
    painter.module.load_state_dict(painter.average)
    write_checkpoint(painter, folder)


def weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file in float32."""
    return {key: value.float() for key, value in load_file(path).items()}


def write_checkpoint(stage: Stage, folder: Path) -> None:
    """As if after one step: the warm-up of the rate comes again."""
    (folder / stage.name).mkdir(exist_ok=True)
    save_checkpoint(stage, folder / stage.name / CHECKPOINT, stage.optimizer(), 1)


def measure(folder: Path) -> dict[str, object]:
    """The figures of the model card, of the trained checkpoints in `folder`."""
    dataset = load_dataset()
    retriever = trained(queries(folder), folder)
    names = text_vectors(retriever.module, retriever.tokenizer, dataset.names)
    nonsense = text_vectors(retriever.module, retriever.tokenizer, list(NONSENSE))
    store = image_vectors(retriever.module, dataset.pixels)
    pixels = trained(autoencoder(folder), folder).module
    return {
        "retrieval": recall(names, store, dataset.concept),
        "text_image_cosine": similarity_ranges(names, nonsense, store, dataset.concept),
        "autoencoder": {
            "psnr_db": reconstruction_psnr(pixels, dataset.pixels[dataset.held_out]),
            "psnr_db_train": reconstruction_psnr(pixels, dataset.pixels[~dataset.held_out][::8]),
        },
    }


def run(name: str, folder: Path, *, steps: int | None, cooldown: int | None, minutes: float) -> None:
    """Train stage `name`; steps and cool-down default to the recipe's."""
    recipe_steps, recipe_cooldown = RECIPE[name]
    plan = Plan(
        steps=recipe_steps if steps is None else steps,
        cooldown=recipe_cooldown if cooldown is None else cooldown,
        minutes=minutes,
    )
    stage = STAGES[name](folder)
    train(stage, folder / stage.name, plan)
    plot_losses(folder / stage.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*RECIPE, "all", "export", "measure", "adopt"])
    parser.add_argument("--folder", type=Path, default=Path("var/training"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=MODELS, help="where `export` writes and `adopt` reads")
    parser.add_argument("--steps", type=int, help="stop when the stage has this many in all (default: the recipe's)")
    parser.add_argument("--cooldown", type=int, help="then decay the rate for this many steps (default: the recipe's)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="or stop each stage after this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.stage == "measure":
        print(json.dumps(measure(arguments.folder), indent=2))
        return
    if arguments.stage == "adopt":
        adopt(arguments.out, arguments.folder)
        return
    for name in RECIPE if arguments.stage == "all" else [arguments.stage]:
        if name != "export":
            run(
                name,
                arguments.folder,
                steps=arguments.steps,
                cooldown=arguments.cooldown,
                minutes=arguments.minutes,
            )
    if arguments.stage in ("all", "export"):
        export(arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
