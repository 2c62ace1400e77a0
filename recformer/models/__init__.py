"""The networks and their losses: encoder, pretraining, recommendation."""

from transformers import AutoConfig, AutoModel

from recformer.config import RecformerConfig
from recformer.models.catalogue import CatalogueHead, HeadOptions, RecformerForCatalogue
from recformer.models.encoder import RecformerModel, RecformerPreTrainedModel
from recformer.models.pretraining import RecformerForPretraining, RecformerPretrainingOutput
from recformer.models.seqrec import RecformerForSeqRec

__all__ = [
    "CatalogueHead",
    "HeadOptions",
    "RecformerForCatalogue",
    "RecformerForPretraining",
    "RecformerForSeqRec",
    "RecformerModel",
    "RecformerPreTrainedModel",
    "RecformerPretrainingOutput",
]

AutoConfig.register(RecformerConfig.model_type, RecformerConfig, exist_ok=True)
AutoModel.register(RecformerConfig, RecformerModel, exist_ok=True)
