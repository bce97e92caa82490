"""What a saved model says of itself, read without running any code.

Stable-Baselines3 writes a ZIP archive: the weights as tensors, and in its part ``data`` a JSON mapping whose values are
plain, or pickles. A pickle is a program, and to read one is to run it. So those are read by an unpickler that knows
nothing but numbers, arrays, spaces, and the classes below by their exact names; what needs more has to be asked for.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Collection
from typing import Any

import torch
from stable_baselines3.common.save_util import open_path

from agents.recurrent import POLICIES
from npg.runs.checkpoints import check_parts

__all__ = ["NotPlain", "Record", "as_lists", "plain_pickle", "saved_attributes", "saved_values"]

_POLICIES = "stable_baselines3.common.policies"
_ADMITTED: dict[str, str] = {
    # Numbers and arrays.
    "collections": "deque OrderedDict",
    "numpy": "dtype ndarray",
    "numpy._core.numeric": "_frombuffer",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy.random._pickle": "__generator_ctor __bit_generator_ctor",
    "numpy.random._pcg64": "PCG64",
    "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence SeedSequence",
    "torch": "device Size",
    "torch._utils": "_rebuild_tensor_v2",
    # Spaces.
    "gymnasium.spaces.box": "Box",
    "gymnasium.spaces.dict": "Dict",
    "gymnasium.spaces.discrete": "Discrete",
    "gymnasium.spaces.multi_binary": "MultiBinary",
    "gymnasium.spaces.multi_discrete": "MultiDiscrete",
    "gymnasium.spaces.tuple": "Tuple",
    "envs.hybrid": "FlatActions",
    "envs.tetris": "Placements VectorPlacements",
    # What an agent's networks, rollouts and schedules are made of.
    _POLICIES: "ActorCriticPolicy ActorCriticCnnPolicy MultiInputActorCriticPolicy",
    "stable_baselines3.common.torch_layers": "FlattenExtractor NatureCNN CombinedExtractor",
    "stable_baselines3.common.buffers": "RolloutBuffer DictRolloutBuffer",
    "stable_baselines3.common.utils": "FloatSchedule ConstantSchedule LinearSchedule",
    "agents.afterstate": "AfterstatePolicy",
    "agents.hybrid": "HybridActorCriticPolicy HybridActorCriticCnnPolicy HybridMultiInputActorCriticPolicy",
    "agents.masks": "MaskableActorCriticPolicy MaskableActorCriticCnnPolicy MaskableMultiInputActorCriticPolicy",
    "agents.buffer": "RolloutBuffer DictRolloutBuffer",
    "agents.sequences": "SequenceBuffer",
    "agents.recurrent": " ".join(POLICIES),
    "torch.nn.modules.activation": " ".join(torch.nn.modules.activation.__all__),
    "npg.families.discrete": "Categorical MultiCategorical Bernoulli",
    "npg.families.normal": "DiagonalGaussian Gaussian",
    "npg.families.product": "Product",
    "npg.geometry": "FisherRao Euclidean",
    "npg.transport": "_DiagonalGaussian _Bernoulli _Graph _CompleteGraph _Product _WeightedGraph",
    "torch.optim.adam": "Adam",
    "torch.optim.adamw": "AdamW",
    "torch.optim.rmsprop": "RMSprop",
    "torch.optim.sgd": "SGD",
}
_RECORDS = {
    ("envs.normalize", "VecNormalize"),
    ("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize"),
    ("stable_baselines3.common.running_mean_std", "RunningMeanStd"),
}
#: Made anew from the other attributes.
_REBUILT = frozenset({"lr_schedule"})


class NotPlain(ValueError):
    """A pickle holds more than data, and was not read."""


class Record:
    """An object's attributes, without its class."""


class _Unpickler(pickle.Unpickler):
    """Reads data and, by their names, the classes that are known; anything else ends it before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, "").split():
            return super().find_class(module, name)
        if (module, name) in _RECORDS:
            return Record
        if (module, name) == (
            "torch.storage",
            "_load_from_bytes",
        ):  # which would unpickle, in tensors outside of PyTorch's
            return lambda content: torch.load(io.BytesIO(content), weights_only=True)
        raise NotPlain(f"it names {module}.{name}")


def plain_pickle(content: bytes) -> Any:
    """What a pickle holds, if that is data: statistics of VecNormalize come as `Record`.

    Raises:
        NotPlain: if it names anything that is not known; nothing of that is imported or called.
        ValueError: if it is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except NotPlain:
        raise
    except Exception as error:  # damaged data can raise anything
        raise ValueError(f"the pickle is damaged ({error or type(error).__name__})") from error


def saved_values(path: Any) -> dict[str, Any]:
    """The attributes of a saved model as its archive has them; every part of it is compared with its checksum.

    Raises:
        ValueError: if the file is damaged.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            check_parts(archive)
            return json.loads(archive.read("data"))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"path={str(path)!r} is not a complete saved model ({str(error) or type(error).__name__}): it may be "
            "truncated; take an earlier checkpoint of the run"
        ) from error
    finally:
        file.seek(0) if file is path else file.close()


def as_lists(value: Any) -> Any:
    """With lists in place of tuples, within lists and dicts too: JSON, in which attributes are saved, has no tuples."""
    if isinstance(value, dict):
        return {key: as_lists(v) for key, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, list | tuple) else value


def saved_attributes(
    path: Any, data: dict[str, Any], given: Collection[str] = (), unpickle: Collection[str] = ()
) -> dict[str, Any]:
    """The attributes that are pickled in a saved model's ``data``, read as data.

    Args:
        path: of the model, for messages.
        data: its `saved_values`.
        given: attributes that the caller has values for; they are not looked at.
        unpickle: attributes that may run code.

    Raises:
        ValueError: if another one is no plain data; it says how to give it, or to trust it.
    """
    found: dict[str, Any] = dict.fromkeys(_REBUILT & data.keys())
    for name, value in data.items():
        if name in _REBUILT or name in given or not (isinstance(value, dict) and ":serialized:" in value):
            continue
        read: Any = plain_pickle
        if name in unpickle:
            warnings.warn(f"{path}: {name} is unpickled, which runs whatever code the file holds", stacklevel=3)
            read = pickle.loads
        try:
            found[name] = read(base64.b64decode(value[":serialized:"]))
        except NotPlain as error:
            raise ValueError(
                f"path={str(path)!r}: its {name} is a pickle that is more than data ({error}), and to read it could "
                f"run any code. Give it with custom_objects={{{name!r}: …}}; or, if you trust the file, say "
                f"unpickle=[{name!r}]"
            ) from error
        except ValueError as error:
            raise ValueError(f"path={str(path)!r}: its {name} is damaged ({error})") from error
    return found
