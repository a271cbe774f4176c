"""Settings of the models: CLIP, and the generators by name."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shared.contracts.common import Name
from shared.errors import ModelNotFoundError
from shared.settings.engines import EngineSettings, Parameter
from shared.settings.section import ADVANCED, Advanced, Section, warn_of_former

STARTER = Path(__file__).resolve().parents[2] / "starter"


class ClipSettings(Section):
    model: str = Field(
        f"local-dir:{STARTER / 'models' / 'clip'}",
        description="model that open_clip loads: `local-dir:<folder>`, `hf-hub:<id>`, or a name such as ViT-B-32",
    )
    pretrained: str | None = Field(
        None, description="open_clip weights tag or file, for a model given by a name such as ViT-B-32"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="cpu, cuda, cuda:N or mps; auto: CUDA if there is a GPU, else the CPU",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of the weights and the computation"
    )
    max_batch_size: int = Field(32, ge=1, le=1024, description="texts or images per call of the model")


class IPAdapterSettings(Section):
    source: Advanced[str] = Field(description="folder or hub id")
    revision: Advanced[str | None] = Field(None, description="commit of the hub repository")
    subfolder: Advanced[str] = Field("ip_adapter", description="folder inside the source that holds the weights")
    weight_name: Advanced[str] = Field("ip_adapter.safetensors", description="file of the weights")
    image_encoder_folder: Advanced[str | None] = Field(
        None, description="folder of the adapter's own image encoder; unset if the retrieval CLIP is that encoder"
    )
    conditions_on: Advanced[Literal["embedding_space", "image"]] = Field(
        "image",
        description="`embedding_space`: the stored vectors condition directly, because the retrieval CLIP is the "
        "adapter's encoder; `image`: the adapter's encoder encodes the stored images again",
    )


class LoraSettings(Section):
    source: Advanced[str] = Field(description="folder or hub id")
    revision: Advanced[str | None] = Field(None, description="commit of the hub repository")
    weight_name: Advanced[str | None] = Field(
        None, description="file of the weights; may be unset if the source has only one"
    )


class QuantizationSettings(Section):
    backend: Advanced[Literal["torchao", "bitsandbytes"]] = Field(
        "torchao",
        description="library that stores the weights in fewer bits; each is an extra of this package; bitsandbytes "
        "needs a GPU",
    )
    type: Advanced[Literal["int8", "float8", "nf4", "fp4"]] = Field(
        "int8", description="type of the weights: int8 or float8 with torchao; int8, nf4 or fp4 with bitsandbytes"
    )
    components: Advanced[list[str]] = Field(
        default_factory=list,
        description="parts of the pipeline, such as transformer and text_encoder; empty: only the denoiser",
    )

    @model_validator(mode="after")
    def _the_backend_has_the_type(self) -> Self:
        types = {"torchao": ("int8", "float8"), "bitsandbytes": ("int8", "nf4", "fp4")}[self.backend]
        if self.type not in types:
            raise ValueError(f"{self.backend} has the types {', '.join(types)}, not {self.type}")
        return self


class GeneratorDefaults(Section):
    """Values for the fields that a request leaves out. `GET /models` shows the values of a loaded model."""

    width: Advanced[int | None] = Field(None, ge=16, le=4096, description="pixels; unset: the model's native width")
    height: Advanced[int | None] = Field(None, ge=16, le=4096, description="pixels; unset: the model's native height")
    num_inference_steps: Advanced[int | None] = Field(
        None, ge=1, le=200, description="denoising steps; unset: the default of the model's pipeline"
    )
    guidance_scale: Advanced[float | None] = Field(
        None,
        ge=0,
        le=30,
        description="guidance as the model's pipeline defines it, true or distilled; 1 or less turns it off in most "
        "models, 0 in all; unset: the default of the pipeline",
    )
    scheduler: Advanced[str | None] = Field(
        None, description="a name of the scheduler allowlist; unset: the model's own scheduler"
    )
    ip_adapter_scale: Advanced[float] = Field(
        0.5,
        ge=0,
        le=2,
        description="weight of the references against the prompt; unset: 1 with `weigh_references`, else 0.5",
    )
    strength: Advanced[float] = Field(
        0.6,
        ge=0.01,
        le=1,
        description="img2img: share of the noise schedule that runs; more of it keeps less of the reference",
    )


def _current_kind(kind: Any) -> Any:
    """`fake` for its former name `cheap`."""
    if kind == "cheap":
        warn_of_former('kind = "cheap"', 'kind = "fake"')
        return "fake"
    return kind


class GeneratorSettings(Section):
    kind: Annotated[Literal["diffusers", "openai", "fake"], ADVANCED, BeforeValidator(_current_kind)] = Field(
        "diffusers",
        description="`openai`: the servers in `engine` draw; `fake`: coloured blocks without a model, in the test "
        "environment only",
    )
    source: str = Field("", description="folder or hub id of a diffusers pipeline")
    revision: str | None = Field(
        None, description="commit of the hub repository; required for a hub id; of an `engine`, as you state it"
    )
    engine: Advanced[EngineSettings | None] = Field(
        None, description="servers that run already and have OpenAI's image calls; required for the kind `openai`"
    )
    variant: Advanced[str | None] = Field(None, description="variant of the pipeline's files, such as fp16")
    single_file: Advanced[str | None] = Field(
        None,
        description="safetensors file with the weights of all parts or of the denoiser alone, or GGUF file with those "
        "of the denoiser; `source` gives the configuration, the tokenizers and the other parts",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="cpu, cuda, cuda:N or mps; auto: CUDA if there is a GPU, else the CPU",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 elsewhere"
    )
    offload: Advanced[Literal["none", "model", "group"]] = Field(
        "none",
        description="weights that wait in the memory of the CPU until they are used: `model`, whole models, such as "
        "the text encoder; `group`, layers, which needs the least memory of the GPU; images do not change",
    )
    quantization: Advanced[QuantizationSettings | None] = Field(
        None, description="weights in fewer bits, which need less memory and change the images a little"
    )
    attention: Advanced[
        Literal["native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"]
        | Literal["flex", "flash", "_flash_3", "sage", "xformers"]
        | None
    ] = Field(
        None,
        description="attention backend of the denoiser, by its name in diffusers; flash, _flash_3, sage and xformers "
        "need their library; unset: as diffusers chooses",
    )
    compile: Advanced[Literal["none", "regional"]] = Field(
        "none",
        description="`regional`: torch compiles the repeated blocks of the denoiser, at the first call of each shape",
    )
    ip_adapter: IPAdapterSettings | None = Field(
        None, description="IP-Adapter that conditions the model on images; unset: no image prompts"
    )
    loras: Advanced[dict[Name, LoraSettings]] = Field(default_factory=dict, description="by the name that requests use")
    defaults: GeneratorDefaults = GeneratorDefaults()
    any_size: Advanced[bool] = Field(
        True, description="the model draws sizes near its native one well; false: only the native size"
    )
    native_side: Advanced[int | None] = Field(
        None,
        ge=16,
        le=4096,
        description="pixels per side for which the model was trained; unset: as its pipeline says, which for FLUX.2 is "
        "always 1024",
    )
    max_sequence_length: Advanced[int | None] = Field(
        None,
        ge=1,
        le=4096,
        description="tokens of a prompt that the model reads, where the pipeline takes this number; unset: as the "
        "pipeline says",
    )
    text_encoder_out_layers: Advanced[list[int] | None] = Field(
        None,
        min_length=1,
        description="hidden states of the text encoder that condition the model, where the pipeline takes them; unset: "
        "as the pipeline says",
    )
    max_batch_size: int = Field(4, ge=1, le=64, description="images per call of the model")
    max_references: Advanced[int] = Field(4, ge=1, le=16, description="references per image")
    reference_side: Advanced[int | None] = Field(
        None,
        ge=16,
        le=2048,
        description="mode `reference`: pixels per side of a reference, where the pipeline takes a size; unset: 512, or "
        "what the pipeline chooses",
    )
    reference_side_of_several: Advanced[int | None] = Field(
        None,
        ge=16,
        le=2048,
        description="mode `reference`: pixels per side of a reference in images whose references stand for several "
        "things (`a dog and a car`, `two dogs`); unset: `reference_side`",
    )
    weigh_references: Advanced[bool] = Field(
        False,
        description="mode `reference`: the references' weights and `ip_adapter_scale` act on the attention, where the "
        "model can; this needs an attention that takes a mask, which is slower; false: weights decide only the order",
    )
    safety_checker: Literal["off", "flag", "blur", "block"] = Field(
        "block",
        description="action on an image that the model's own safety checker rejects; no effect without a checker",
    )
    cost_ms: Advanced[float] = Field(5, ge=0, le=10_000, description="fake generator only: time of one batch")

    @property
    def text_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, by name, that decide how it reads a prompt; only those that are set."""
        return self.model_dump(include={"max_sequence_length", "text_encoder_out_layers"}, exclude_none=True)

    @model_validator(mode="after")
    def _weighed_references_have_the_scale_of_the_training(self) -> Self:
        if self.weigh_references and "ip_adapter_scale" not in self.defaults.model_fields_set:
            # The model is frozen for its readers, not yet for its validators.
            self.__dict__["defaults"] = self.defaults.model_copy(update={"ip_adapter_scale": 1.0})
        return self

    @model_validator(mode="after")
    def _a_pipeline_is_named_and_pinned(self) -> Self:
        if self.kind != "diffusers":
            return self
        if not self.source:
            raise ValueError("source is required")
        if self.source.endswith(MODEL_FILES):
            raise ValueError("source is a file: name it in single_file, and in source the pipeline it belongs to")
        if not _is_folder(self.source) and self.revision is None:
            raise ValueError(f"{self.source!r} is not a folder, so it is a hub id, and a hub id needs a revision")
        return self

    @model_validator(mode="after")
    def _an_engine_is_named_and_has_defaults(self) -> Self:
        if (self.kind == "openai") != (self.engine is not None):
            raise ValueError('engine and kind = "openai" belong together')
        if self.engine is None:
            return self
        if self.source or self.single_file or self.ip_adapter is not None or self.loras:
            raise ValueError("an engine loads its model itself: source, single_file, ip_adapter and loras do not apply")
        with_defaults: tuple[Parameter, ...] = ("num_inference_steps", "guidance_scale")
        unset = [name for name in with_defaults if self.engine.fields[name] and getattr(self.defaults, name) is None]
        if unset:
            raise ValueError(
                f"an engine does not say its defaults: set {', '.join(f'defaults.{name}' for name in unset)}"
            )
        return self

    @model_validator(mode="after")
    def _compiled_blocks_take_no_scales(self) -> Self:
        if self.compile != "none" and (self.ip_adapter is not None or self.loras):
            raise ValueError("compile is not for an ip_adapter or loras: with each scale the blocks are compiled again")
        return self

    @field_validator("single_file")
    @classmethod
    def _the_file_holds_no_code(cls, file: str | None) -> str | None:
        if file is not None and not file.endswith((".safetensors", ".gguf")):
            raise ValueError(f"{file!r} is neither a safetensors nor a GGUF file; other files may contain code")
        return file


MODEL_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def _is_folder(source: str) -> bool:
    return Path(source).is_dir() or source.startswith((".", "/"))


def _starter_generator() -> dict[str, GeneratorSettings]:
    return {
        "starter": GeneratorSettings(
            source=str(STARTER / "models" / "generator"),
            native_side=128,
            any_size=False,
            max_batch_size=8,
            max_sequence_length=24,
            text_encoder_out_layers=[3],
            reference_side=128,
            reference_side_of_several=64,
            defaults=GeneratorDefaults(width=128, height=128, num_inference_steps=14, guidance_scale=1.0),
        )
    }


class ModelSettings(Section):
    clip: ClipSettings = ClipSettings()
    generators: dict[Name, GeneratorSettings] = Field(
        default_factory=_starter_generator, min_length=1, description="image models by the name that requests use"
    )
    default_generator: str = Field("starter", description="model of a request that names no model")
    threads: int = Field(0, ge=0, le=256, description="CPU threads of a model process; 0: torch decides")
    offline: bool = Field(True, description="load models from this machine only; false: download from a model hub")

    @model_validator(mode="after")
    def _the_default_exists(self) -> Self:
        if self.default_generator not in self.generators:
            raise ValueError(
                f"default_generator {self.default_generator!r} is not one of generators: {sorted(self.generators)}"
            )
        return self

    def generator(self, name: str) -> GeneratorSettings:
        """The settings of one generator.

        Raises:
            ModelNotFoundError: no generator has this name.
        """
        if name not in self.generators:
            raise ModelNotFoundError(model=name, models=sorted(self.generators))
        return self.generators[name]
