#if canImport(CoreGraphics)
extension @@NAME@@.Pixels {
    /// The levels of an image as they are stored: colour profiles are ignored, as training pipelines ignore them, and
    /// transparent parts show white. A `CGImage` knows no orientation: see `upright(orientation:)`, or read the file with
    /// `init(contentsOf:)`.
    public init(_ image: CGImage) throws {
        let (width, height) = (image.width, image.height)
        let isGray = image.colorSpace?.model == .monochrome
        let space = isGray ? CGColorSpaceCreateDeviceGray() : CGColorSpaceCreateDeviceRGB()
        let hasProfile = isGray || image.colorSpace?.model == .rgb  // others, such as CMYK, need the conversion
        let plain = hasProfile ? image.copy(colorSpace: space) ?? image : image
        let channels = isGray ? 1 : 4
        var bytes = [UInt8](repeating: 255, count: max(width * height * channels, 1))  // white
        let drawn = bytes.withUnsafeMutableBytes { buffer -> Bool in
            let alpha = isGray ? CGImageAlphaInfo.none : CGImageAlphaInfo.noneSkipLast
            guard
                let context = CGContext(
                    data: buffer.baseAddress, width: width, height: height, bitsPerComponent: 8,
                    bytesPerRow: width * channels, space: space, bitmapInfo: alpha.rawValue)
            else { return false }
            context.interpolationQuality = .none
            context.draw(plain, in: CGRect(x: 0, y: 0, width: width, height: height))
            return true
        }
        guard drawn else {
            throw @@NAME@@.Failure.badImage("the image of \(width)x\(height) pixels cannot be drawn; save it as PNG or JPEG")
        }
        try self.init(width: width, height: height, bytes: bytes, channels: channels, order: isGray ? [0, 0, 0] : [0, 1, 2])
    }

    /// An image file, upright as its EXIF orientation says. JPEG decoders may differ by a level or two.
    public init(contentsOf url: URL) throws {
        guard let source = CGImageSourceCreateWithURL(url as CFURL, nil),
            let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
        else {
            throw @@NAME@@.Failure.badImage("\(url.lastPathComponent) cannot be read as an image")
        }
        let properties = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any]
        let orientation = (properties?[kCGImagePropertyOrientation] as? NSNumber)?.intValue ?? 1
        self = try @@NAME@@.Pixels(image).upright(orientation: orientation)
    }

    /// A frame of a camera or a video. Its alpha is ignored; formats other than BGRA, ARGB, RGBA and 8-bit gray (such as
    /// the cameras' YCbCr) are converted by VideoToolbox.
    public init(_ buffer: CVPixelBuffer) throws {
        let order: [Int]
        switch CVPixelBufferGetPixelFormatType(buffer) {
        case kCVPixelFormatType_32BGRA: order = [2, 1, 0]
        case kCVPixelFormatType_32ARGB: order = [1, 2, 3]
        case kCVPixelFormatType_32RGBA: order = [0, 1, 2]
        case kCVPixelFormatType_OneComponent8: order = [0, 0, 0]
        default:
            var image: CGImage?
            VTCreateCGImageFromCVPixelBuffer(buffer, options: nil, imageOut: &image)
            guard let image else {
                throw @@NAME@@.Failure.badImage("the pixel buffer has a format that VideoToolbox cannot convert; use BGRA")
            }
            try self.init(image)
            return
        }
        let (width, height) = (CVPixelBufferGetWidth(buffer), CVPixelBufferGetHeight(buffer))
        let channels = order == [0, 0, 0] ? 1 : 4
        var bytes = [UInt8]()
        bytes.reserveCapacity(width * height * channels)
        CVPixelBufferLockBaseAddress(buffer, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(buffer, .readOnly) }
        guard let start = CVPixelBufferGetBaseAddress(buffer) else {
            throw @@NAME@@.Failure.badImage("the pixel buffer has no memory that can be read")
        }
        for y in 0..<height {
            let row = UnsafeRawBufferPointer(
                start: start + y * CVPixelBufferGetBytesPerRow(buffer), count: width * channels)
            bytes.append(contentsOf: row)
        }
        try self.init(width: width, height: height, bytes: bytes, channels: channels, order: order)
    }

    /// Picks red, green and blue out of pixels of so many bytes.
    private init(width: Int, height: Int, bytes: [UInt8], channels: Int, order: [Int]) throws {
        var levels = [UInt8](repeating: 0, count: width * height * 3)
        for place in 0..<width * height {
            for channel in 0..<3 { levels[3 * place + channel] = bytes[place * channels + order[channel]] }
        }
        try self.init(width: width, height: height, levels: levels)
    }
}
#endif
