"""What is asked of TorchDynamo beyond its public interface: where inputs come from, guards, limits, first steps."""
