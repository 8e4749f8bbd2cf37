// Just enough of Core Graphics, and of Core Foundation's names, for the compiler; see CoreML.swift.

import Foundation

public typealias CFURL = URL
public typealias CFString = String
public typealias CFDictionary = [String: Any]

public enum CGColorSpaceModel: Int32, Sendable { case unknown = -1, monochrome, rgb, cmyk, lab }

public class CGColorSpace {
    public var model: CGColorSpaceModel { fatalError() }
}

public func CGColorSpaceCreateDeviceGray() -> CGColorSpace { fatalError() }
public func CGColorSpaceCreateDeviceRGB() -> CGColorSpace { fatalError() }

public class CGImage {
    public var width: Int { fatalError() }
    public var height: Int { fatalError() }
    public var colorSpace: CGColorSpace? { fatalError() }
    public func copy(colorSpace: CGColorSpace) -> CGImage? { fatalError() }
}

public enum CGImageAlphaInfo: UInt32, Sendable { case none, premultipliedLast, premultipliedFirst, last, first, noneSkipLast }

public enum CGInterpolationQuality: Int32, Sendable { case `default`, none, low, high, medium }

public class CGContext {
    public init?(
        data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int, bytesPerRow: Int,
        space: CGColorSpace, bitmapInfo: UInt32
    ) { fatalError() }
    public var interpolationQuality: CGInterpolationQuality { get { fatalError() } set { fatalError() } }
    public func draw(_ image: CGImage, in rect: CGRect, byTiling: Bool = false) { fatalError() }
}
