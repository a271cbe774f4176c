"""`python -m starter.train STAGE`: train one stage from its last checkpoint, or run `all`, `export` or `measure`.

`adopt` makes checkpoints from exported models, to continue their training where no checkpoints exist.

Order: clip, then queries, which needs it; autoencoder, then generator, which needs it; judge, export.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Tokenizer

from starter.train.autoencoder import AutoencoderStage
from starter.train.clip import JUDGE, RETRIEVER, ClipShape, ClipStage, image_vectors
from starter.train.dataset import load_dataset
from starter.train.export import export_clip
from starter.train.files import replace_folder
from starter.train.generator import GeneratorStage, caption_texts
from starter.train.generator import learn_tokenizer as learn_generator_tokenizer
from starter.train.loop import CHECKPOINT, Plan, Stage, best_checkpoint, load_checkpoint, save_checkpoint, train
from starter.train.measure import (
    NONSENSE,
    everyday_queries,
    recall,
    reconstruction_psnr,
    similarity_ranges,
    text_vectors,
)
from starter.train.plot import plot_losses
from starter.train.queries import QueryStage
from starter.train.scenes import SceneMaker
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
    """Return the stage `queries` on the best CLIP in `folder`.

    It trains a copy, so the text encoder of the generator does not change.
    """
    retriever = load_best(clip(folder), folder)
    return QueryStage(retriever.dataset, retriever.module, retriever.tokenizer)


def autoencoder(folder: Path) -> AutoencoderStage:
    return AutoencoderStage(load_dataset().samples)


def generator(folder: Path) -> GeneratorStage:
    """Return the stage `generator` on the best autoencoder in `folder`, which must not change later."""
    stage = load_best(autoencoder(folder), folder)
    samples = stage.scenes.samples
    tokenizer_folder = folder / "generator_tokenizer"
    if not tokenizer_folder.exists():
        learn_generator_tokenizer(caption_texts(samples)).save_pretrained(str(tokenizer_folder))
    return GeneratorStage(samples, stage.autoencoder, Qwen2Tokenizer.from_pretrained(str(tokenizer_folder)))


RECIPE: dict[str, tuple[int, int]] = {
    "clip": (740, 240),
    "queries": (1150, 150),
    "judge": (700, 200),
    "autoencoder": (1450, 350),
    "generator": (6000, 1000),
}
"""By stage: steps at the constant rate and steps of cool-down, in the order of the stages' dependencies."""

STAGES: dict[str, Callable[[Path], Stage]] = {
    "clip": clip,
    "queries": queries,
    "judge": judge,
    "autoencoder": autoencoder,
    "generator": generator,
}


def load_best(stage: AnyStage, folder: Path) -> AnyStage:
    """Load the best checkpoint of the stage and return the stage in evaluation mode.

    Raises:
        FileNotFoundError: the stage has no checkpoint.
    """
    checkpoint = best_checkpoint(folder / stage.name)
    if load_checkpoint(stage, checkpoint) == 0:
        raise FileNotFoundError(f"{checkpoint}: train {stage.name} first")
    stage.module.eval()
    return stage


def export(folder: Path, out: Path) -> None:
    """Write clip/, judge/ and generator/ into `out`, each where its stage has a checkpoint.

    Each folder is replaced as a whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as new:
        for name, (target, write) in EXPORTS.items():
            if best_checkpoint(folder / name).exists():
                write(folder, Path(new) / target)
                replace_folder(Path(new) / target, out / target)


def write_clip(folder: Path, target: Path) -> None:
    stage = load_best(queries(folder), folder)
    export_clip(stage.module, RETRIEVER, stage.tokenizer, target)


def write_judge(folder: Path, target: Path) -> None:
    stage = load_best(judge(folder), folder)
    export_clip(stage.module, JUDGE, stage.tokenizer, target)


def write_generator(folder: Path, target: Path) -> None:
    load_best(generator(folder), folder).pipeline().to(torch.float16).save_pretrained(target)


EXPORTS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "queries": ("clip", write_clip),
    "judge": ("judge", write_judge),
    "generator": ("generator", write_generator),
}
"""By stage: the folder of its export, and the function that writes it."""


def adopt(models: Path, folder: Path) -> None:
    """Write checkpoints with the weights of the exported `models` into `folder`, to continue their training.

    An export has neither the optimisers' states nor full float32 precision, so both are lost.

    Raises:
        FileExistsError: `folder` already has checkpoints.
    """
    if (folder / "clip").exists():
        raise FileExistsError(f"{folder} already has checkpoints")
    load_tokenizer(models / "clip").save_pretrained(str(folder / "tokenizer"))
    retriever = clip(folder)
    retriever.module.load_state_dict(load_weights(models / "clip" / "open_clip_model.safetensors"))
    write_checkpoint(retriever, folder)
    write_checkpoint(queries(folder), folder)
    judge_stage = judge(folder)
    judge_stage.module.load_state_dict(load_weights(models / "judge" / "open_clip_model.safetensors"))
    write_checkpoint(judge_stage, folder)
    adopt_generator(models / "generator", folder)


def adopt_generator(parts: Path, folder: Path) -> None:
    """Write the checkpoints of the stages `autoencoder` and `generator`, and the tokenizer, into `folder`."""
    Qwen2Tokenizer.from_pretrained(str(parts / "tokenizer")).save_pretrained(str(folder / "generator_tokenizer"))
    autoencoder_stage = autoencoder(folder)
    autoencoder_stage.module.load_state_dict(load_weights(parts / "vae" / DIFFUSERS_WEIGHTS))
    write_checkpoint(autoencoder_stage, folder)
    stage = generator(folder)
    stage.transformer.load_state_dict(load_weights(parts / "transformer" / DIFFUSERS_WEIGHTS))
    stage.text_encoder.load_state_dict(load_weights(parts / "text_encoder" / "model.safetensors"), strict=False)
    stage.text_encoder.tie_weights()
    stage.average = {name: value.detach().clone() for name, value in stage.module.state_dict().items()}
    write_checkpoint(stage, folder)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file as float32."""
    return {key: value.float() for key, value in load_file(path).items()}


def write_checkpoint(stage: Stage, folder: Path) -> None:
    """Write a checkpoint at step 1, so that the warm-up of the learning rate is repeated."""
    (folder / stage.name).mkdir(exist_ok=True)
    save_checkpoint(stage, folder / stage.name / CHECKPOINT, stage.optimizer(), 1)


def measure(folder: Path) -> dict[str, object]:
    """Return the figures of the model card for the checkpoints in `folder`."""
    dataset = load_dataset()
    retriever = load_best(queries(folder), folder)
    names = text_vectors(retriever.module, retriever.tokenizer, dataset.names)
    nonsense = text_vectors(retriever.module, retriever.tokenizer, list(NONSENSE))
    store = image_vectors(retriever.module, dataset.pixels)
    best_autoencoder = load_best(autoencoder(folder), folder).autoencoder
    return {
        "retrieval": recall(names, store, dataset.concept),
        "text_image_cosine": similarity_ranges(names, nonsense, store, dataset.concept),
        "everyday_queries": everyday_queries(retriever),
        "autoencoder": {
            "psnr_db": reconstruction_psnr(best_autoencoder, SceneMaker(dataset.samples, held_out=True)),
            "psnr_db_train": reconstruction_psnr(best_autoencoder, SceneMaker(dataset.samples)),
        },
    }


def run(name: str, folder: Path, *, steps: int | None, cooldown: int | None, minutes: float) -> None:
    """Train stage `name`. steps, cooldown: None for the values of `RECIPE`."""
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
    parser.add_argument("--folder", type=Path, default=Path("var/training"), help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder that `export` writes and `adopt` reads")
    parser.add_argument(
        "--steps", type=int, help="stop when the stage has this many steps in total (default: from the recipe)"
    )
    parser.add_argument(
        "--cooldown", type=int, help="then decay the learning rate for this many steps (default: from the recipe)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop each stage after this time")
    parser.add_argument(
        "--device", default="cpu", help="device of all tensors, for example cuda (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
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
