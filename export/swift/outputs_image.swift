    /// What the model answers to an image of any size; it is scaled as in training.
    public func outputs(for image: Pixels) throws -> Outputs {
        let answer = try self.answer(to: [@@INPUT_TEXT@@: @@IMAGE_INPUT@@])
        return Outputs(
            @@OUTPUT_VALUES@@
        )
    }
