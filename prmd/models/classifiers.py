"""One-logit classifiers of families for which transformers has no class of its own, such as Cohere or Granite.

    r(x, y) = w . h(x, y)

The plain model of the family under the linear head that transformers puts on its other families; it is registered, so that
the library's own loading finds it. A folder of such a reward model holds the few lines of code that make the class, by which
any user of transformers loads it with `trust_remote_code=True`.
"""

import inspect
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from prmd.artifacts import io
from prmd.errors import ConfigError

_CODE_FILE = "modeling_reward_model.py"
_AUTO = "AutoModelForSequenceClassification"
_READ = ("input_ids", "attention_mask", "position_ids")
"""What rewards give to the plain model."""
_CODE = '''"""{name}: the plain model under one linear head, for transformers has no such class of this family."""

from transformers.modeling_layers import GenericForSequenceClassification
from {module} import {base}


class {name}(GenericForSequenceClassification, {base}):
    base_model_prefix = "{prefix}"

    @classmethod
    def is_custom_code(cls):
        """The family's own code initializes weights; otherwise transformers leaves some of its buffers out."""
        return False
'''


def provide_classifier(model_config: Any) -> None:
    """Make the classifier of a family known to transformers where it has none.

    Args:
        model_config: the transformers configuration of a base model or of a reward model.

    Raises:
        ConfigError: none can be made of this family; names it.
    """
    kind, known = type(model_config), AutoModelForSequenceClassification._model_mapping
    if kind in known or _AUTO in (getattr(model_config, "auto_map", None) or {}):
        return
    plain = AutoModel._model_mapping.get(kind, None)
    if not isinstance(plain, type) or not _can_be_read(plain, model_config):
        raise ConfigError(
            f"{model_config.name_or_path or 'model.name'}: transformers has no sequence classifier of the "
            f"{model_config.model_type} family, and none can be made of its plain model, so it cannot be a reward model; "
            "choose a model of another family"
        )
    base = _family(plain)
    name = f"{plain.__name__.removesuffix('Model')}ForSequenceClassification"
    parts = {"config_class": kind, "base_model_prefix": base.base_model_prefix, "__module__": __name__}
    # of custom code transformers leaves buffers without a value that the family sets at the level of its model, as Falcon-H1
    parts["is_custom_code"] = classmethod(lambda cls: False)
    classifier = type(name, (GenericForSequenceClassification, base), parts)
    # transformers leaves out what is registered of its own families unless it may replace
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)


def describe_classifier(model_config: Any) -> str:
    """The class by which a model of this family is a reward model, in words.

    Raises:
        ConfigError: as `provide_classifier`.
    """
    provide_classifier(model_config)
    found = AutoModelForSequenceClassification._model_mapping.get(type(model_config), None)
    if found is None:
        return "the sequence classifier of the model's own code"
    if found in _provided():
        return f"a one-logit head on the plain model of the {model_config.model_type} family, saved with its code"
    return f"{found.__name__} of transformers"


def _can_be_read(plain: type, model_config: Any) -> bool:
    """Whether it is a decoder of text alone that takes what rewards give it."""
    if model_config.is_encoder_decoder or model_config.get_text_config() is not model_config:
        return False
    return bool(_family(plain).base_model_prefix) and set(_READ) <= set(
        inspect.signature(plain.forward).parameters
    )


def _family(plain: type) -> type[PreTrainedModel]:
    """The class that all models of a family have in common."""
    return next(
        c for c in reversed(plain.__mro__) if issubclass(c, PreTrainedModel) and c is not PreTrainedModel
    )


def save_code(directory: Path) -> None:
    """Put beside a saved reward model the code of its class, where transformers has none."""
    values = io.read_json(directory / "config.json")
    [name] = values["architectures"]
    classifier = next(
        (c for c in _provided() if c.__name__ == name and c.config_class.model_type == values["model_type"]),
        None,
    )
    if classifier is None:
        return
    base = classifier.__mro__[2]
    code = _CODE.format(
        name=name, module=base.__module__, base=base.__name__, prefix=classifier.base_model_prefix
    )
    io.write_text(directory / _CODE_FILE, code)
    values["auto_map"] = {_AUTO: f"{Path(_CODE_FILE).stem}.{name}"}
    io.write_json(directory / "config.json", values)


def _provided() -> list[type[PreTrainedModel]]:
    return [c for c in GenericForSequenceClassification.__subclasses__() if c.__module__ == __name__]
