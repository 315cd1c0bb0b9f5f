"""The spectrum of the dissipation Gramian, and its split into signal channel and reservoir."""
