"""Tokenizer and generator as one object, its folder, its class names, and what runs and samples are on disk."""

from vistok.pipelines.chat import Chat, Message
from vistok.pipelines.generation import Pipeline, PipelineOutput, Preview, pipeline

__all__ = ["Chat", "Message", "Pipeline", "PipelineOutput", "Preview", "pipeline"]
