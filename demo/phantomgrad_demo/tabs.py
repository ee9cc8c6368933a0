"""The tabs of the page: their settings, and the places of what they show."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import markup, panels
from .guard import GuardedImage, GuardedSlider
from .handlers import SMALLEST_DAMPING, Handlers
from .nearby import CHANGES, MOST_PERCENT
from .saliency import MOST_PHANTOM_STEPS
from .settings import MOST_STEPS, SOLVERS, tolerances_for
from .tab_handlers import TabHandlers
from .wording import chosen

Controls = tuple[gr.Radio, GuardedSlider, gr.Radio, GuardedSlider]
"""Of solver, most steps, tolerance and damping."""
Given = tuple[GuardedImage, gr.HTML]
"""The photo, and where it is from."""
Events = dict[str, Any]
"""The options of every event that runs the model."""


def watch_tab(handlers: Handlers) -> Controls:
    """The curves, maps and settings of one solve; returns the settings' controls."""
    own = handlers.settings
    html_block(markup.TAKEAWAY, js_on_load=markup.TAB_READY)
    with gr.Row(elem_classes=["pg-controls", "pg-asks"]):
        solver = gr.Radio(list(SOLVERS), value=own.solver, label="Solver", elem_id="pg-solver", scale=3)
        steps = GuardedSlider(
            1,
            MOST_STEPS,
            value=own.max_steps,
            step=1,
            label="Most solver steps",
            elem_id="pg-steps",
            buttons=[],
            scale=2,
        )
        tolerance = gr.Radio(
            [(chosen(each), each) for each in tolerances_for(own)],
            value=own.tolerance,
            label="Tolerance",
            elem_id="pg-tolerance",
            scale=3,
        )
        damping = GuardedSlider(
            SMALLEST_DAMPING,
            1.0,
            value=own.damping,
            step=0.05,
            label="Damping (fixed point)",
            elem_id="pg-damping",
            scale=2,
            buttons=[],
        )
    html_block(markup.CURVES, js_on_load=markup.TAB_READY, elem_id="pg-curves")
    html_block(markup.maps(len(handlers.model.config.channels)), js_on_load=markup.TAB_READY)
    return solver, steps, tolerance, damping


def compare_tab(tab: gr.Tab, tabs: TabHandlers, given: Given, controls: Controls, events: Events) -> None:
    """Two settings side by side."""
    takeaway = html_block(panels.hint(panels.COMPARE_HINT).takeaway)
    own = tabs.page.settings
    _, _, tolerance, damping = controls
    with gr.Row(elem_classes="pg-controls"):
        first_solver = gr.Radio(list(SOLVERS), value=own.solver, label="A: solver")
        first_steps = GuardedSlider(1, MOST_STEPS, value=own.max_steps, step=1, label="A: most steps", buttons=[])
    with gr.Row(elem_classes="pg-controls"):
        second_solver = gr.Radio(list(SOLVERS), value="fixed point", label="B: solver")
        second_steps = GuardedSlider(1, MOST_STEPS, value=own.max_steps, step=1, label="B: most steps", buttons=[])
        second_damping = GuardedSlider(
            SMALLEST_DAMPING, 1.0, value=1.0, step=0.05, label="B: damping (fixed point)", buttons=[]
        )
    run = gr.Button("Compare", variant="primary", elem_classes="pg-run")
    result = html_block("", elem_id="pg-compared")
    inputs = [*given, first_solver, first_steps, second_solver, second_steps, second_damping, tolerance, damping]
    gr.on([tab.select, run.click], tabs.compare, inputs, [takeaway, result], **events)


def gradient_tab(tab: gr.Tab, tabs: TabHandlers, given: Given, events: Events) -> None:
    """Saliency by several gradients."""
    takeaway = html_block(panels.hint(panels.GRADIENT_HINT).takeaway)
    with gr.Row(elem_classes="pg-controls"):
        steps = GuardedSlider(
            1, MOST_PHANTOM_STEPS, value=5, step=1, label="Steps of the phantom gradients", buttons=[]
        )
        damping = GuardedSlider(
            SMALLEST_DAMPING, 1.0, value=0.7, step=0.05, label="Damping of the phantom gradients", buttons=[]
        )
    run = gr.Button("Differentiate", variant="primary", elem_classes="pg-run")
    result = html_block("", elem_id="pg-gradient")
    gr.on(
        [tab.select, run.click, steps.input, damping.input],
        tabs.gradients,
        [*given, steps, damping],
        [takeaway, result],
        **events,
    )


def nearby_tab(tab: gr.Tab, tabs: TabHandlers, given: Given, controls: Controls, events: Events) -> None:
    """A changed photo solved warm and cold."""
    takeaway = html_block(panels.hint(panels.NEARBY_HINT).takeaway)
    with gr.Row(elem_classes="pg-controls"):
        change = gr.Radio(list(CHANGES), value=CHANGES[0], label="Change of the photo")
        amount = GuardedSlider(0, MOST_PERCENT, value=5, step=1, label="Percent of change", buttons=[])
    run = gr.Button("Solve from both", variant="primary", elem_classes="pg-run")
    result = html_block("", elem_id="pg-nearby")
    gr.on(
        [tab.select, run.click, change.input, amount.input],
        tabs.nearby,
        [*given, change, amount, *controls],
        [takeaway, result],
        **events,
    )


def html_block(value: str, **options: Any) -> gr.HTML:
    """The page's own HTML, styled by `page.css` alone."""
    return gr.HTML(value, apply_default_css=False, **options)
