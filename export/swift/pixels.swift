extension @@NAME@@ {
    /// An image as plain levels, which may go from one task to another: red, green and blue of each pixel, row by row.
    public struct Pixels: Equatable, Sendable {
        /// Pixels in a row.
        public let width: Int
        /// Rows.
        public let height: Int
        /// Three levels (0 to 255) for each pixel: red, green, blue.
        public let levels: [UInt8]

        /// Throws `Failure.badImage` for an image without pixels, or another number of levels than `width * height * 3`.
        public init(width: Int, height: Int, levels: [UInt8]) throws {
            guard width >= 1, height >= 1, levels.count == width * height * 3 else {
                throw Failure.badImage("an image of \(width)x\(height) pixels cannot have \(levels.count) levels")
            }
            self.width = width
            self.height = height
            self.levels = levels
        }

        /// The image as a person would see it.
        ///
        /// - Parameter orientation: EXIF's number, 1 to 8; 1, and any other number, is upright already.
        public func upright(orientation: Int) -> Pixels {
            guard (2...8).contains(orientation) else { return self }
            let turned = orientation >= 5
            let (columns, rows) = turned ? (height, width) : (width, height)
            var result = [UInt8](repeating: 0, count: levels.count)
            for y in 0..<rows {
                for x in 0..<columns {
                    // Where the pixel that belongs at (x, y) lies in the stored image.
                    let (fromX, fromY): (Int, Int)
                    switch orientation {
                    case 2: (fromX, fromY) = (width - 1 - x, y)
                    case 3: (fromX, fromY) = (width - 1 - x, height - 1 - y)
                    case 4: (fromX, fromY) = (x, height - 1 - y)
                    case 5: (fromX, fromY) = (y, x)
                    case 6: (fromX, fromY) = (y, height - 1 - x)
                    case 7: (fromX, fromY) = (width - 1 - y, height - 1 - x)
                    default: (fromX, fromY) = (width - 1 - y, x)
                    }
                    let from = (fromY * width + fromX) * 3, to = (y * columns + x) * 3
                    for channel in 0..<3 { result[to + channel] = levels[from + channel] }
                }
            }
            return Pixels(turnedWidth: columns, height: rows, levels: result)
        }

        private init(turnedWidth width: Int, height: Int, levels: [UInt8]) {
            self.width = width
            self.height = height
            self.levels = levels
        }

        /// One row as floats: red, green and blue, or ITU-R BT.601 luma alone.
        func read(row: Int, gray: Bool, into result: inout [Float]) {
            let start = row * width * 3
            if !gray {
                for index in 0..<width * 3 { result[index] = Float(levels[start + index]) }
                return
            }
            for x in 0..<width {
                let red = Float(levels[start + 3 * x]), green = Float(levels[start + 3 * x + 1])
                let blue = Float(levels[start + 3 * x + 2])
                // Green plus differences, so that gray pixels keep their level to the last bit.
                result[x] = green + 0.299 * (red - green) + 0.114 * (blue - green)
            }
        }
    }
}
