"""Tokenizer and generator as one object, its folder, its class names, and what runs and samples are on disk."""

from vistok.pipelines.assembly import assemble, pipeline
from vistok.pipelines.chat import Chat, Message
from vistok.pipelines.generation import Pipeline, PipelineOutput, Preview

__all__ = ["Chat", "Message", "Pipeline", "PipelineOutput", "Preview", "assemble", "pipeline"]
