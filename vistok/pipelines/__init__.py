"""Pipelines: a tokenizer and a generator as one object, with its folder, class names, chats and samples."""

from vistok.pipelines.assembly import assemble, pipeline
from vistok.pipelines.chat import Chat, Message
from vistok.pipelines.generation import Pipeline, PipelineOutput, Preview

__all__ = ["Chat", "Message", "Pipeline", "PipelineOutput", "Preview", "assemble", "pipeline"]
