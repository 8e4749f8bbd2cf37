    /// Runs the model.
    ///
@@PARAMETER_DOCS@@
    /// - Throws: `Failure.badInput` for another shape, `Failure.unusableModel` where Core ML cannot run it.
    public func outputs(@@PARAMETERS@@) throws -> Outputs {
        @@CHECKS@@
        let answer = try self.answer(to: [@@INPUT_PAIRS@@])
        return Outputs(
            @@OUTPUT_VALUES@@
        )
    }
