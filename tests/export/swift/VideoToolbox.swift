// Just enough of Video Toolbox for the compiler; see CoreML.swift.

import CoreGraphics
import CoreVideo
import Foundation

@discardableResult
public func VTCreateCGImageFromCVPixelBuffer(
    _ buffer: CVPixelBuffer, options: CFDictionary?, imageOut: UnsafeMutablePointer<CGImage?>
) -> Int32 { fatalError() }
