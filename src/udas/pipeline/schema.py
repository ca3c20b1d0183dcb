"""The JSON schema of run files as people write them: presets, run-wide defaults and rounds included."""

from __future__ import annotations

import json
from typing import Any

from udas.evaluation.protocols import PROTOCOLS
from udas.pipeline.config import RunConfig
from udas.pipeline.expand import RoundsStage

JSON = dict[str, Any]


def run_schema() -> JSON:
    """A JSON schema that editors complete and check run files with."""
    schema = RunConfig.model_json_schema()
    models: JSON = schema["$defs"]
    schema["properties"] |= {"network": _model("NetworkConfig"), "training": _model("TrainingConfig")}
    schema["required"].remove("name")
    rounds = RoundsStage.model_json_schema()
    rounds["properties"] |= {"label": _model("LabelConfig"), "student": _model("TrainStage")}
    models["RoundsStage"] = rounds
    kinds = [*schema["properties"]["stages"]["additionalProperties"]["oneOf"], _model("RoundsStage")]
    schema["properties"]["stages"]["additionalProperties"] = {"anyOf": kinds}
    _one_or_many(models["DomainConfig"]["properties"]["map"])
    del models["StreetsConfig"]["required"]  # a preset may give the rest
    domains = {"description": "preset (`udas list data`), or a YAML file"}
    models["DomainChange"] = _by_preset(models["DomainConfig"] | {"required": []}, domains)
    models["DomainConfig"] = _by_preset(models["DomainConfig"], domains)
    models["ProtocolConfig"] = _by_preset(models["ProtocolConfig"], {"enum": sorted(PROTOCOLS)})
    _allow_base(schema)
    return schema


def _allow_base(schema: JSON) -> None:
    """With `base`, a file needs stages alone, and says of its data sets only what differs."""
    models, properties = schema["$defs"], schema["properties"]
    change = json.loads(json.dumps(models["DataConfig"]).replace("/DomainConfig", "/DomainChange"))
    models["DataChange"] = {key: value for key, value in change.items() if key != "required"}
    properties["base"] = {"type": "string", "description": "preset (`udas list bases`), or a YAML file"}
    data = properties.pop("data")
    properties["data"] = {"description": models["DataConfig"]["description"]}
    schema["anyOf"] = [
        {"required": ["base", "stages"], "properties": {"data": _model("DataChange")}},
        {"required": schema.pop("required"), "properties": {"data": data}},
    ]


def _model(name: str) -> JSON:
    return {"$ref": f"#/$defs/{name}"}


def _one_or_many(values: JSON) -> None:
    """A list of one element may be written without brackets."""
    several = values["additionalProperties"]
    values["additionalProperties"] = {"anyOf": [several, several["items"]]}


def _by_preset(model: JSON, names: JSON) -> JSON:
    """The name of a preset; or its keys, all of them or those that differ from `preset`."""
    preset = {"type": "string", **names}
    keys = model | {"properties": {"preset": preset, **model["properties"]}}
    required = keys.pop("required", [])
    return {"anyOf": [preset, keys | {"anyOf": [{"required": ["preset"]}, {"required": required}]}]}
