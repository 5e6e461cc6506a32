//! Pictures in a terminal: half blocks in 24-bit colour, two pixels a character.

use std::fmt::Write as _;

use anstyle::{RgbColor, Style};
use image::RgbImage;
use image::imageops::thumbnail;

/// Side of a thumbnail in characters' widths.
const SIDE: u32 = 20;

/// Pictures beside each other, as lines of text.
pub(super) fn thumbnails(pictures: &[RgbImage]) -> String {
    let small: Vec<RgbImage> = pictures.iter().map(|p| thumbnail(p, SIDE, SIDE)).collect();
    let mut text = String::new();
    for y in (0..SIDE).step_by(2) {
        for picture in &small {
            for x in 0..SIDE {
                let colour = |y: u32| {
                    let [r, g, b] = picture.get_pixel(x, y).0;
                    Some(RgbColor(r, g, b).into())
                };
                let style = Style::new().fg_color(colour(y)).bg_color(colour(y + 1));
                let _ = write!(text, "{style}▀{style:#}");
            }
            text.push(' ');
        }
        text.push('\n');
    }
    text
}
