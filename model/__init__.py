"""The network, its attention strategies, the streaming memory and the engine. Torch only: no ROS, no Triton."""
