#if canImport(CoreML)
extension @@NAME@@ {
    /// Levels of the model's size, red, green and blue or gray alone, as an image that Core ML takes. The model itself
    /// says in which order it wants the channels.
    private static func feature(levels: [UInt8]) throws -> MLFeatureValue {
        let (width, height, channels) = (recipe.width, recipe.height, recipe.channels)
        guard levels.count == width * height * channels else {
            throw Failure.badInput("the model takes \(width)x\(height) pixels, got \(levels.count) levels")
        }
        let format = channels == 1 ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
        let attributes = [kCVPixelBufferIOSurfacePropertiesKey as String: [String: Any]()] as CFDictionary
        var created: CVPixelBuffer?
        CVPixelBufferCreate(kCFAllocatorDefault, width, height, format, attributes, &created)
        guard let buffer = created else {
            throw Failure.badInput("there is no memory for an image of \(width)x\(height) pixels")
        }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        guard let start = CVPixelBufferGetBaseAddress(buffer) else {
            throw Failure.badInput("the image of \(width)x\(height) pixels has no memory that can be written")
        }
        for y in 0..<height {
            let row = (start + y * CVPixelBufferGetBytesPerRow(buffer)).assumingMemoryBound(to: UInt8.self)
            for x in 0..<width {
                let from = (y * width + x) * channels
                if channels == 1 {
                    row[x] = levels[from]
                } else {
                    row[4 * x] = levels[from + 2]
                    row[4 * x + 1] = levels[from + 1]
                    row[4 * x + 2] = levels[from]
                    row[4 * x + 3] = 255
                }
            }
        }
        return MLFeatureValue(pixelBuffer: buffer)
    }
}
#endif
