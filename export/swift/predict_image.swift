    /// The likeliest classes of an image.
    ///
    /// - Parameters:
    ///   - image: of any size; it is scaled as in training.
    ///   - count: how many classes, at least 1.
    public func predict(_ image: Pixels, count: Int = 5) throws -> [Prediction] {
        try Self.likeliest(outputs(for: image).@@SCORES@@.values, count: count)
    }

    /// The likeliest classes of an image. The file's orientation is not in a `CGImage`: see `Pixels`.
    public nonisolated func predict(image: CGImage, count: Int = 5) async throws -> [Prediction] {
        try await predict(Pixels(image), count: count)
    }

    /// The likeliest classes of a frame of a camera or a video.
    public nonisolated func predict(pixelBuffer: CVPixelBuffer, count: Int = 5) async throws -> [Prediction] {
        try await predict(Pixels(pixelBuffer), count: count)
    }
