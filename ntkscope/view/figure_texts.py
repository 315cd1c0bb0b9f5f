"""The words under each figure: what is seen, and how to read it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FigureText:
    """The words under a figure.

    Attributes:
        shows: What is seen.
        reading: How to read it.
    """

    shows: str
    reading: str


FIGURE_TEXTS = {
    "spectrum": FigureText(
        "Every mark in the upper panel is one direction. Its height ω is the share of the loss along that direction that training removed.",
        "Round marks are signal (learned), crosses are reservoir. A clean gap between them means that the split is meaningful; a smooth "
        "slope means that the number depends on the rule. The lower panel shows where each rule would draw the line; "
        "a round mark there is a rule that picks directions one by one, at the number that it picks.",
    ),
    "eigenstructure": FigureText(
        "Every point is one training example, placed by how much of its error training has removed along three "
        "directions: those along which it removed the most loss.",
        "Far from the centre: the shared patterns explain this example. Near the centre: they do not, so it is learned later, or stored "
        "by itself. Move the slider to watch training; drag, or use the turn buttons, to look from another side. The axes are the same "
        "at every moment, so points move only because examples are learned.",
    ),
    "omega_surface": FigureText(
        "The height is ω again, now for every direction and every moment of training.",
        "Directions are learned one after the other, the strongest first. The line on the surface marks ω = ½. "
        "Ground that stays flat is the reservoir.",
    ),
    "signal_share": FigureText(
        "One line is the share of the squared error that training removed, the other what is left. The dotted line is the share of the "
        "whole error at the start that lies in the signal channel, the directions that count as learned at the window's end.",
        "Where the first line meets the dotted one, about as much is removed as the signal channel holds. What goes beyond was taken "
        "from the reservoir, as in memorizing single examples.",
    ),
    "suspicious_inputs": FigureText(
        "The inputs of the most suspicious examples, in reading order, all with one scale of brightness. Larger inputs are drawn small.",
        "Look for inputs whose given label is wrong, and for odd but right ones. Where wrong labels were planted, they have a thick dashed "
        "frame and the true label in bold.",
    ),
    "cells": FigureText(
        "The predicted change of the test outputs in four parts: caused by clean labels or by label noise, through the signal channel or "
        "through the reservoir. Each bar is the size of one part over the size of the whole change.",
        "The theory expects a short bar for noise through the reservoir: stored noise that test outputs do not feel. The parts have "
        "directions and may cancel, so the bars need not add up to 100 %. Where the noise is unknown, the split is a rough estimate.",
    ),
    "drift": FigureText(
        "Above: how far the kernel is from that at the window's start, relative to it. Middle: how fast it moves. Below: how much it is "
        "still like the first kernel, and how much like one made of the targets; 1 is the same up to a factor and a constant.",
        "A kernel that stays is lazy training: a fixed kernel would do. One that turns towards the targets learns features. Velocity that "
        "jumps late in training often stems from kinks or a learning rate that is too large.",
    ),
    "suspicious": FigureText(
        "The longer the bar, the more of the example's error at the start lies where training did little.",
        "Examples that agree with the others are learned through shared directions; a wrong label agrees with nothing and stays in the "
        "reservoir. So do rare but correct examples: look before you delete.",
    ),
    "loss_and_closure": FigureText(
        "Above: the loss as it was and as the recorded kernels predict it. Below: how far the predicted gradient is off.",
        "If the two upper lines agree and the lower one stays under the dotted limit inside the shaded window, the numbers in this report "
        "describe what the run really did.",
    ),
    "gate_openness": FigureText(
        "The share of parameters whose gate was open, that is, whose gradient stood out from its noise.",
        "A gate that closes almost everywhere stops training; one that never closes does nothing.",
    ),
    "gate_motion": FigureText(
        "At every audited step: of the output motion that the gate removed, the share that lay in the reservoir. The band is what the same "
        "gates remove when they are shuffled among the parameters of each layer.",
        "Above the band: the gate spares signal better than chance. Below: it hits signal. Inside: no evidence. The dotted line is the "
        "reservoir's share of all motion before the gate.",
    ),
    "gate_agreement": FigureText(
        "Every cell is one layer at one audited step: the chance that a parameter with an open gate has more signal than one with a "
        "closed gate.",
        "Blue: open gates sit on signal parameters. Red: on reservoir parameters. Pale: no relation. A number is written where shuffled "
        "gates would show it in fewer than one of twenty cases.",
    ),
    "gate_density": FigureText(
        "Every parameter by the signal-to-noise of its gradient, which is all the gate sees, and by its signal share: how much of what it "
        "moves lies in the signal channel.",
        "Right of the dashed line gates are open. If the theory's shortcut worked perfectly, parameters would lie low on the left and high "
        "on the right.",
    ),
    "gate_modes": FigureText(
        "One ribbon for each layer. Its height is how much of a direction's kernel the gate keeps in that layer, from the strongest signal "
        "direction to the last of the reservoir.",
        "A selective gate keeps ribbons high up to the red line and low behind it. Flat ribbons mean that the gate treats all directions "
        "alike. Drag, or use the turn buttons, to look from another side.",
    ),
}
