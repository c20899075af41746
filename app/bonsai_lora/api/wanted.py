"""The modules that the body of POST /v1/sets asks for."""

from dataclasses import replace

from bonsai_lora import errors
from bonsai_lora.api import schemas
from bonsai_lora.core.shapes import MODELS, AttentionShape, MlpShape, Shapes, layered


def wanted_shapes(wanted: schemas.CreateSet) -> tuple[Shapes, str]:
    """Return the requested shapes and the name of the base model.

    Fields given in addition to `model` override that part of it.
    """
    attention = AttentionShape(**wanted.attention.model_dump()) if wanted.attention else None
    mlp = MlpShape(**wanted.mlp.model_dump()) if wanted.mlp else None
    if wanted.model is not None:
        model = MODELS.get(wanted.model)
        if model is None:
            raise errors.InvalidRequestError(
                f"model {wanted.model[:100]!r} is unknown; expected one of {', '.join(MODELS)}",
                field="model",
                expected=list(MODELS),
            )
        own = replace(
            model,
            attention=attention or model.attention,
            mlp=mlp or model.mlp,
            num_layers=wanted.num_layers or model.num_layers,
        )
        return own.modules(), wanted.base_model_name or wanted.model
    shapes = {**(attention.modules() if attention else {}), **(mlp.modules() if mlp else {})}
    if wanted.num_layers is None:
        return shapes, wanted.base_model_name
    if not shapes:
        raise errors.InvalidRequestError(
            "num_layers is given without attention or mlp; add the shapes of one layer",
            field="num_layers",
        )
    return layered(shapes, wanted.num_layers), wanted.base_model_name
