"""What transformers' extension points do not carry across, one file a model type, found by its file name."""
