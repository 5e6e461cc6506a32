//! Paints facts: 48 × 48 pixels, a plain background, objects with antialiased edges.

use std::f32::consts::PI;

use rand::Rng;
use rand::seq::index::sample;
use tiny_skia::{
    Color, FillRule, FilterQuality, IntSize, Paint, Path, PathBuilder, Pixmap, PixmapPaint, Rect,
    Transform,
};

use crate::facts::{Facts, Object};
use crate::words::{COLOURS, NUMBERS, SHAPES};
use crate::{Split, digits};

/// Side of a picture in pixels.
pub const SIDE: usize = 48;
/// Frames of a video.
pub const FRAMES: usize = 4;
/// Where a moving object is, frame by frame, in pixels along its way.
const WAY: [f32; FRAMES] = [8.0, 18.0, 29.0, 40.0];
/// Side of small and big objects in pixels: least and most.
const SIZES: [(f32, f32); 2] = [(13.0, 16.0), (22.0, 27.0)];

/// A painted picture: rows of red, green, blue, `[SIDE, SIDE, 3]`.
pub type Pixels = Vec<u8>;

/// Where an object was painted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Region {
    /// What it is.
    pub object: Object,
    /// Centre and half side in pixels.
    pub centre: (f32, f32),
    /// Half of the object's side in pixels.
    pub half: f32,
}

/// A medium: its frames, and where the objects of the first frame are.
#[derive(Debug, Clone)]
pub struct Medium {
    /// One picture, or the frames of a video.
    pub frames: Vec<Pixels>,
    /// The objects in the first frame.
    pub regions: Vec<Region>,
}

/// Paints what the facts say.
pub fn draw(facts: Facts, split: Split, rng: &mut impl Rng) -> Medium {
    match facts {
        Facts::Single { object, size, place } => {
            let mut near = |middle: f32| middle + rng.random_range(-3.0..3.0);
            let (near_edge, far_edge) = if size == 0 { (11.0, 37.0) } else { (15.0, 33.0) };
            let centre = match place {
                0 => (near(near_edge), near(24.0)),
                1 => (near(far_edge), near(24.0)),
                2 => (near(24.0), near(near_edge)),
                _ => (near(24.0), near(far_edge)),
            };
            picture(&[(Look::random(object, size, split, rng), centre)], rng)
        }
        Facts::Several { object, count } => {
            let quarters = sample(rng, 4, count + 1).into_vec();
            let mut place = |quarter: usize| {
                let mut near = |i: usize| 12.0 + 24.0 * i as f32 + rng.random_range(-3.0..3.0);
                let centre = (near(quarter % 2), near(quarter / 2));
                (Look::random(object, 0, split, rng), centre)
            };
            let objects: Vec<_> = quarters.into_iter().map(&mut place).collect();
            picture(&objects, rng)
        }
        Facts::Pair(left, right) => {
            let mut place = |object, x: f32| {
                let centre = (x + rng.random_range(-3.0..3.0), 24.0 + rng.random_range(-9.0..9.0));
                (Look::random(object, 0, split, rng), centre)
            };
            let objects = [place(left, 12.0), place(right, 36.0)];
            picture(&objects, rng)
        }
        Facts::Moves { object, direction } => {
            let across = 24.0 + rng.random_range(-9.0..9.0);
            let centre = |frame: usize| match direction {
                0 => (WAY[FRAMES - 1 - frame], across),
                1 => (WAY[frame], across),
                2 => (across, WAY[FRAMES - 1 - frame]),
                _ => (across, WAY[frame]),
            };
            let look = Look::random(object, 0, split, rng);
            video(rng, |frame| Some((look, centre(frame))))
        }
        Facts::Flashes { object, count } => {
            let lit = sample(rng, FRAMES, count.min(NUMBERS.len() - 1) + 1).into_vec();
            let centre = (rng.random_range(12.0..36.0), rng.random_range(12.0..36.0));
            let look = Look::random(object, 0, split, rng);
            video(rng, |frame| lit.contains(&frame).then_some((look, centre)))
        }
    }
}

/// How one object looks, wherever it is.
#[derive(Debug, Clone, Copy)]
struct Look {
    object: Object,
    colour: Color,
    side: f32,
    /// Which handwritten example, for digits.
    example: usize,
}

impl Look {
    fn random(object: Object, size: usize, split: Split, rng: &mut impl Rng) -> Look {
        let shade = |value: u8, rng: &mut dyn rand::RngCore| {
            let value = f32::from(value) + rng.random_range(-15.0..15.0);
            value.clamp(0.0, 255.0) / 255.0
        };
        let [r, g, b] = COLOURS[object.colour].1.map(|value| shade(value, rng));
        let example = match object.kind.checked_sub(SHAPES) {
            Some(digit) => rng.random_range(digits::examples(digit, split)),
            None => 0,
        };
        Look {
            object,
            colour: Color::from_rgba(r, g, b, 1.0).expect("shares between 0 and 1"),
            side: rng.random_range(SIZES[size].0..SIZES[size].1),
            example,
        }
    }

    fn paint(self, canvas: &mut Pixmap, centre: (f32, f32)) -> Region {
        let half = self.side / 2.0;
        let inside = |x: f32| x.clamp(half, SIDE as f32 - half);
        let centre = (inside(centre.0), inside(centre.1));
        let place = Transform::from_scale(self.side, self.side)
            .post_translate(centre.0 - half, centre.1 - half);
        match self.object.kind.checked_sub(SHAPES) {
            Some(digit) => self.paint_digit(canvas, digit, place),
            None => {
                let mut paint = Paint::default();
                paint.set_color(self.colour);
                let path = shape(self.object.kind);
                canvas.fill_path(&path, &paint, FillRule::EvenOdd, place, None);
            }
        }
        Region { object: self.object, centre, half }
    }

    /// The digit's pixels are its coverage.
    fn paint_digit(self, canvas: &mut Pixmap, digit: usize, place: Transform) {
        let colour = self.colour.to_color_u8();
        let share = |value: u8, coverage: u8| (u16::from(value) * u16::from(coverage) / 255) as u8;
        let pixels = digits::pixels(digit, self.example);
        let premultiplied = pixels
            .iter()
            .flat_map(|c| {
                let [r, g, b] = [colour.red(), colour.green(), colour.blue()].map(|v| share(v, *c));
                [r, g, b, *c]
            })
            .collect();
        let size = IntSize::from_wh(digits::SIDE as u32, digits::SIDE as u32).expect("not empty");
        let stamp = Pixmap::from_vec(premultiplied, size).expect("as many bytes as pixels");
        let scale = 1.0 / digits::SIDE as f32;
        let paint = PixmapPaint { quality: FilterQuality::Bilinear, ..PixmapPaint::default() };
        canvas.draw_pixmap(0, 0, stamp.as_ref(), &paint, place.pre_scale(scale, scale), None);
    }
}

/// A shape in the unit square.
fn shape(kind: usize) -> Path {
    let mut path = PathBuilder::new();
    match kind {
        0 => path.push_circle(0.5, 0.5, 0.5),
        1 => path.push_rect(Rect::from_xywh(0.06, 0.06, 0.88, 0.88).expect("a rectangle")),
        2 => polygon(&mut path, &[(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]),
        3 => {
            let corner = |i: usize| {
                let radius = if i.is_multiple_of(2) { 0.5 } else { 0.21 };
                let angle = -PI / 2.0 + i as f32 * PI / 5.0;
                (0.5 + radius * angle.cos(), 0.5 + radius * angle.sin())
            };
            polygon(&mut path, &(0..10).map(corner).collect::<Vec<_>>());
        }
        4 => {
            let (a, b) = (0.33, 0.67);
            let corners = [
                (a, 0.0),
                (b, 0.0),
                (b, a),
                (1.0, a),
                (1.0, b),
                (b, b),
                (b, 1.0),
                (a, 1.0),
                (a, b),
                (0.0, b),
                (0.0, a),
                (a, a),
            ];
            polygon(&mut path, &corners);
        }
        _ => {
            path.push_circle(0.5, 0.5, 0.5);
            path.push_circle(0.5, 0.5, 0.24);
        }
    }
    path.finish().expect("a path with points")
}

fn polygon(path: &mut PathBuilder, corners: &[(f32, f32)]) {
    path.move_to(corners[0].0, corners[0].1);
    for (x, y) in &corners[1..] {
        path.line_to(*x, *y);
    }
    path.close();
}

type Placed = (Look, (f32, f32));

fn picture(objects: &[Placed], rng: &mut impl Rng) -> Medium {
    let (pixels, regions) = frame(objects, rng);
    Medium { frames: vec![pixels], regions }
}

fn video(rng: &mut impl Rng, object: impl Fn(usize) -> Option<Placed>) -> Medium {
    let frames: Vec<_> = (0..FRAMES).map(|i| frame(object(i).as_slice(), rng)).collect();
    let regions = frames[0].1.clone();
    Medium { frames: frames.into_iter().map(|(pixels, _)| pixels).collect(), regions }
}

/// One picture on a grey, slightly tinted background.
fn frame(objects: &[Placed], rng: &mut impl Rng) -> (Pixels, Vec<Region>) {
    let mut canvas = Pixmap::new(SIDE as u32, SIDE as u32).expect("a picture is not empty");
    let grey = rng.random_range(10.0..60.0f32);
    let [r, g, b] = [0; 3].map(|_| (grey + rng.random_range(-6.0..6.0)) / 255.0);
    canvas.fill(Color::from_rgba(r, g, b, 1.0).expect("shares between 0 and 1"));
    let regions = objects.iter().map(|(look, centre)| look.paint(&mut canvas, *centre)).collect();
    let pixels = canvas.data().chunks_exact(4).flat_map(|rgba| [rgba[0], rgba[1], rgba[2]]);
    (pixels.collect(), regions)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Pixels that are not background, as a share of the picture.
    fn covered(pixels: &Pixels) -> usize {
        pixels.chunks_exact(3).filter(|p| p.iter().any(|v| *v > 100)).count()
    }

    #[test]
    fn a_seed_gives_a_picture() {
        let facts = |rng: &mut ChaCha8Rng| Facts::picture(Split::Train, rng);
        let paint = |seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let facts = facts(&mut rng);
            draw(facts, Split::Train, &mut rng).frames
        };
        assert_eq!(paint(7), paint(7));
        assert_ne!(paint(7), paint(8));
    }

    #[test]
    fn objects_are_where_their_regions_say() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..200 {
            let facts = Facts::picture(Split::Train, &mut rng);
            let medium = draw(facts, Split::Train, &mut rng);
            let inside = |x: usize, y: usize| {
                medium.regions.iter().any(|r| {
                    let near = |at: f32, p: usize| (p as f32 + 0.5 - at).abs() <= r.half + 1.0;
                    near(r.centre.0, x) && near(r.centre.1, y)
                })
            };
            for (i, p) in medium.frames[0].chunks_exact(3).enumerate() {
                let bright = p.iter().any(|v| *v > 100);
                assert!(!bright || inside(i % SIDE, i / SIDE), "{facts:?}: pixel {i}");
            }
            assert!(covered(&medium.frames[0]) > 20, "{facts:?}");
        }
    }

    #[test]
    fn an_object_flashes_as_often_as_it_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for count in 0..4 {
            let object = Object::random(Split::Train, &mut rng);
            let medium = draw(Facts::Flashes { object, count }, Split::Train, &mut rng);
            let lit = medium.frames.iter().filter(|frame| covered(frame) > 0).count();
            assert_eq!(lit, count + 1);
        }
    }
}
