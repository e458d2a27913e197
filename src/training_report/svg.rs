//! Curves of a run as a picture: the losses, and below them the learning rate.

use super::Metrics;
use plotters::{
    coord::{Shift, types::RangedCoordf64},
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::{collections::BTreeMap, ops::Range};

type Failed = DrawingAreaErrorKind<std::io::Error>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// In pixels.
const SIZE: (u32, u32) = (960, 640);
const HEIGHT_OF_LOSSES: u32 = 430;

const TRAIN: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const VAL: RGBColor = RGBColor(0xd9, 0x5f, 0x02);
const RATE: RGBColor = RGBColor(0x2c, 0x8c, 0x4a);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);

impl Metrics {
    /// An SVG document. `title` stands above the curves.
    pub(crate) fn svg(&self, title: &str) -> anyhow::Result<String> {
        let mut text = String::new();
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        self.draw(title, &area)?;
        area.present()?;
        drop(area);
        Ok(text)
    }

    fn draw(&self, title: &str, area: &Area) -> Result<(), Failed> {
        let losses: BTreeMap<u64, f64> = self.train.iter().map(|(iteration, report)| (*iteration, report.loss)).collect();
        let rates: BTreeMap<u64, f64> =
            self.train.iter().filter_map(|(iteration, report)| Some((*iteration, report.learning_rate?))).collect();
        let last = losses.keys().chain(self.val_loss.keys()).max().copied().unwrap_or_default().max(1) as f64;
        area.fill(&WHITE)?;
        let whole = area.titled(title, ("sans-serif", 20))?;
        let (upper, lower) = match rates.is_empty() {
            true => (whole, None),
            false => {
                let (upper, lower) = whole.split_vertically(HEIGHT_OF_LOSSES);
                (upper, Some(lower))
            }
        };

        let values = range(losses.values().chain(self.val_loss.values()));
        let label = |loss: &f64| label(*loss, &values);
        let mut chart = axes(&upper, last, values.clone(), "loss", lower.is_none(), &label)?;
        curve(&mut chart, &losses, TRAIN, Some("training"))?;
        curve(&mut chart, &self.val_loss, VAL, Some("validation"))?;
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .label_font(("sans-serif", 15))
            .draw()?;
        if let Some(lower) = lower {
            let top = rates.values().copied().fold(0.0, f64::max);
            let highest = if top > 0.0 { top * 1.05 } else { 1.0 };
            let mut chart = axes(&lower, last, 0.0..highest, "learning rate", true, &|rate| format!("{rate:.1e}"))?;
            curve(&mut chart, &rates, RATE, None)?;
        }
        Ok(())
    }
}

/// From the least to the greatest with some air. Without spread there would be no scale.
fn range<'a>(values: impl Iterator<Item = &'a f64>) -> Range<f64> {
    let (least, greatest) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, greatest), value| (least.min(*value), greatest.max(*value)));
    // Less would be lost in the rounding of great numbers.
    let air = ((greatest - least) * 0.05).max(0.02).max(greatest.abs() * 1e-3);
    (least - air).max(if least >= 0.0 { 0.0 } else { f64::NEG_INFINITY })..greatest + air
}

/// A loss on the axis of `values`, short enough for the room beside it.
fn label(loss: f64, values: &Range<f64>) -> String {
    if values.start.abs().max(values.end.abs()) >= 1e6 {
        return format!("{loss:.3e}");
    }
    let digits = if values.end - values.start < 0.2 { 3 } else { 2 };
    format!("{loss:.digits$}")
}

fn axes<'a, 'b>(
    area: &'b Area<'a>,
    last: f64,
    values: Range<f64>,
    name: &str,
    name_iterations: bool,
    label: &dyn Fn(&f64) -> String,
) -> Result<Chart<'a, 'b>, Failed> {
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(24)
        .x_label_area_size(if name_iterations { 46 } else { 28 })
        .y_label_area_size(78)
        .build_cartesian_2d(0.0..last, values)?;
    let text = ("sans-serif", 14).into_font().color(&RGBColor(0x40, 0x40, 0x40));
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(RGBColor(0x80, 0x80, 0x80))
        .y_desc(name)
        .y_labels(6)
        .x_labels(10)
        .label_style(text.pos(Pos::new(HPos::Center, VPos::Center)))
        .axis_desc_style(("sans-serif", 15))
        .x_label_formatter(&|iteration| if iteration.fract() == 0.0 { format!("{iteration}") } else { String::new() })
        .y_label_formatter(label);
    if name_iterations {
        mesh.x_desc("iteration");
    }
    mesh.draw()?;
    Ok(chart)
}

/// A line, and a dot where there are few points to see.
fn curve(chart: &mut Chart, points: &BTreeMap<u64, f64>, color: RGBColor, name: Option<&str>) -> Result<(), Failed> {
    const FEW: usize = 40;
    if points.is_empty() {
        return Ok(());
    }
    let at = points.iter().map(|(iteration, value)| (*iteration as f64, *value));
    let line = LineSeries::new(at, color.stroke_width(2)).point_size(if points.len() <= FEW { 3 } else { 0 });
    let series = chart.draw_series(line)?;
    if let Some(name) = name {
        series.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(3)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training_report::metrics::TrainReport;

    /// Of 600 iterations.
    fn run() -> Metrics {
        let loss = |i: u64| 1.1 + 3.0 * (-(i as f64) / 120.0).exp() + 0.08 * (i as f64 * 0.7).sin();
        let rate =
            |i: u64| if i < 100 { 2e-4 * i as f64 / 100.0 } else { 1e-4 * (1.0 + ((i - 100) as f64 / 500.0 * std::f64::consts::PI).cos()) };
        let report = |i: u64| TrainReport { loss: loss(i), learning_rate: Some(rate(i)), ..TrainReport::default() };
        Metrics {
            train: (1..=60).map(|i| (i * 10, report(i * 10))).collect(),
            val_loss: (0..=6).map(|i| (i * 100, loss(i * 100) + 0.2)).collect(),
            ..Metrics::default()
        }
    }

    #[test]
    fn a_picture_has_both_losses_the_rate_and_their_names() {
        let svg = run().svg("adapters of <a run>").unwrap();
        for word in ["training", "validation", "iteration", "learning rate", "loss", "adapters of &lt;a run&gt;", "2.0e-4"] {
            assert!(svg.contains(word), "{word}");
        }
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for color in [TRAIN, VAL, RATE] {
            assert!(svg.contains(&format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2)), "{color:?}");
        }
    }

    #[test]
    fn a_single_report_and_a_run_without_rates_are_drawn_too() {
        let one = Metrics { val_loss: BTreeMap::from([(0, 2.0)]), ..Metrics::default() };
        let svg = one.svg("one").unwrap();
        assert!(svg.contains("validation") && !svg.contains("training") && !svg.contains("learning rate") && svg.contains("iteration"));
        let flat = Metrics { train: BTreeMap::from([(1, TrainReport::default()), (2, TrainReport::default())]), ..Metrics::default() };
        assert!(flat.svg("flat").unwrap().contains("training"));
    }

    #[test]
    fn losses_as_great_as_they_can_be_are_drawn_with_their_scale() {
        let greatest = f64::from(f32::MAX);
        for losses in [vec![-greatest, greatest], vec![greatest], vec![1e15], vec![1e15, 1e15], vec![-1e15, -1e15], vec![3.0, 1e20]] {
            let val_loss: BTreeMap<u64, f64> = (0..).zip(losses).collect();
            let svg = Metrics { val_loss: val_loss.clone(), ..Metrics::default() }.svg("great").unwrap();
            let labels = svg.lines().filter(|line| line.trim().contains('e') && line.trim().parse::<f64>().is_ok()).count();
            assert!(labels >= 3, "{labels} labels for {val_loss:?}");
        }
    }
}
