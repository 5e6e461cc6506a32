//! What the plots of all pages share: their width, their letters, and the SVG that they are drawn into.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;

/// Width of a plot, in pixels.
const WIDTH: u32 = 960;
/// Letters that are readable when a phone shrinks the plot.
pub(crate) const FONT: (&str, i32) = ("sans-serif", 18);

/// What is drawn on.
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// An SVG of that height.
pub(crate) fn svg(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw(&area)?;
        area.present()?;
    }
    Ok(svg)
}

/// Names of the series, in a corner.
pub(crate) fn legend<'a, 'b: 'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>,
    corner: SeriesLabelPosition,
) -> Result<()>
where
    X: Ranged,
    Y: Ranged,
{
    let mut legend = chart.configure_series_labels();
    legend.position(corner).label_font(FONT).background_style(WHITE.mix(0.8)).draw()?;
    Ok(())
}
