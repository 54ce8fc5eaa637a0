"""Recipes: TOML files checked by pydantic models. An unknown key, a wrong type or a value out of range is an error naming the key.

Each class of these modules is one section of a recipe and the `settings` of the stage that reads it. Defaults are the paper's
(SimLM, arXiv 2207.02578, tables 9 and 10; its code where the paper is silent) unless a comment says otherwise.
"""

from simlm.recipe.comparison import CompareSettings
from simlm.recipe.data import DataSettings, PrepareSettings, expand_path
from simlm.recipe.finetuning import (
    LOWEST_TEMPERATURE,
    MINING_PARTS,
    MIX_SOURCES,
    DevSettings,
    DistillSettings,
    MiningPart,
    MiningSettings,
    RerankerSection,
    RerankerSettings,
    RetrieverSettings,
    initialisation_name,
)
from simlm.recipe.loading import load_recipe, parse_recipe
from simlm.recipe.model import LoraSettings, ModelSettings, TrainingSettings
from simlm.recipe.pretraining import OBJECTIVE_NAMES, SAMPLING_OBJECTIVES, GeneratorSettings, PretrainSettings, ProbeSettings
from simlm.recipe.pseudo_queries import (
    ENDPOINT_QUERY_KINDS,
    PSEUDO_QUERY_KINDS,
    ConsistencySettings,
    EndpointSettings,
    PseudoQuerySettings,
)
from simlm.recipe.recipe import Recipe
from simlm.recipe.retrieval import EncodeSettings, EvaluateSettings, FuseSettings, IndexSettings, SearchSettings
from simlm.recipe.section import Section
from simlm.recipe.teachers import (
    CheckTeacherSettings,
    HybridTeacherSettings,
    OutsideRerankSettings,
    RerankSettings,
    SampledRerankSettings,
    TeacherSettings,
)
from simlm.types import SPLITS

__all__ = [
    "ENDPOINT_QUERY_KINDS",
    "LOWEST_TEMPERATURE",
    "MINING_PARTS",
    "MIX_SOURCES",
    "OBJECTIVE_NAMES",
    "PSEUDO_QUERY_KINDS",
    "SAMPLING_OBJECTIVES",
    "SPLITS",
    "CheckTeacherSettings",
    "CompareSettings",
    "ConsistencySettings",
    "DataSettings",
    "DevSettings",
    "DistillSettings",
    "EncodeSettings",
    "EndpointSettings",
    "EvaluateSettings",
    "FuseSettings",
    "GeneratorSettings",
    "HybridTeacherSettings",
    "IndexSettings",
    "LoraSettings",
    "MiningPart",
    "MiningSettings",
    "ModelSettings",
    "OutsideRerankSettings",
    "PrepareSettings",
    "PretrainSettings",
    "ProbeSettings",
    "PseudoQuerySettings",
    "Recipe",
    "RerankSettings",
    "RerankerSection",
    "RerankerSettings",
    "RetrieverSettings",
    "SampledRerankSettings",
    "SearchSettings",
    "Section",
    "TeacherSettings",
    "TrainingSettings",
    "expand_path",
    "initialisation_name",
    "load_recipe",
    "parse_recipe",
]
