"""Whether a folder holds exactly the tensors of a model, by the headers of its files alone."""

import dataclasses

from absl import logging

from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.hf_folder import Folder
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError, did_you_mean, some

_FLOATS = ("BF16", "F16", "F32")  # unquantised weights may have any of them
_ROTARY_BUFFER = "rotary_emb.inv_freq"  # old files hold frequencies, which follow from the config


def without_absent_mtp(folder: Folder, model: ModelConfig) -> ModelConfig:
    """The model without its MTP modules when the folder holds no tensor of theirs.

    transformers keeps `num_nextn_predict_layers` in config.json, but saves no such layer.
    """
    present = {n.split(".")[2] for n in folder.tensors if n.startswith("model.layers.")}
    modules = {str(model.num_layers + i) for i in range(model.mtp_depth)}
    return model if modules & present else dataclasses.replace(model, mtp_depth=0)


def check_tensors(folder: Folder, model: ModelConfig) -> None:
    """Checks every tensor of a folder against the name table, by its header.

    A projection is FP8 with its scales, or unquantised without. MTP's copies of the embedding and
    the head may be absent. A router bias that is not float32 is accepted with a warning: bfloat16
    has lost its small updates.

    Raises:
      UserError: tensors that are missing, unknown, or of another shape or dtype, by name.
    """
    table, stored = hf.tensors(model, "fp8"), folder.tensors
    missing, shapes, dtypes, scales = [], [], [], []
    for name, tensor in table.items():
        found = stored.get(name)
        if tensor.is_scale:
            weight = stored.get(name.removesuffix(hf.SCALE_SUFFIX))
            quantized = weight is not None and weight.dtype == "F8_E4M3"
            if quantized and found is None:
                scales.append(f"{weight.name} is FP8 but has no {hf.SCALE_SUFFIX.strip('_')}")
            elif weight is not None and not quantized and found is not None:
                scales.append(f"{name} belongs to a weight of dtype {weight.dtype}")
        elif found is None and not tensor.is_copy:
            missing.append(name)
        if found is None:
            continue
        if found.shape != tensor.shape:
            shapes.append(f"{name} is {_by(found.shape)} instead of {_by(tensor.shape)}")
        if found.dtype not in (allowed := _allowed(tensor)):
            dtypes.append(f"{name} is {found.dtype} instead of {' or '.join(allowed)}")
    unknown = [n for n in stored if n not in table and not n.endswith(_ROTARY_BUFFER)]
    # The right name is most likely one that is missing.
    if unknown and (hint := did_you_mean(unknown[0], missing[:1000])):
        unknown[0] += f" ({hint.strip()})"
    problems = [
        f"{what} {some(names)}".strip()
        for what, names in (
            ("it lacks", missing),
            ("it holds unknown", unknown),
            ("", shapes),
            ("", dtypes),
            ("", scales),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{folder.path} does not fit its config.json: {'; '.join(problems)}; download the "
            f"checkpoint again or correct config.json"
        )
    rounded = [t for t in table.values() if t.slot.path.endswith("router.bias")]
    rounded = [t.name for t in rounded if stored[t.name].dtype != "F32"]
    if rounded:
        logging.warning("not float32, so small updates were lost: %s", some(rounded))


def _allowed(tensor: hf.Tensor) -> tuple[str, ...]:
    if tensor.is_scale:
        return ("F32",)
    return ("F8_E4M3", *_FLOATS) if tensor.dtype == "F8_E4M3" else _FLOATS


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
