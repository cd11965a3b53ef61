"""What massive activations sit on, whether that explains a prediction, and what they do to it.

``by_type`` counts them by label of their edge, with intervals; ``first_layer`` derives those of the
first layer from the weights; ``parts`` takes the ratio apart; ``edge_scores`` has established
attributions of edges, ``faithfulness`` the curves they are compared by, and ``interventions``
replaces massive activations themselves.
"""
