//! How anything that holds parameters shows them, one by one.

use crate::served::Adaptable;
use mlx_rs::Array;

/// Anything that holds parameters. Compiled pieces swap the arrays for traced ones, so the order must be fixed.
pub trait Parameters {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array));
    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array));
    /// Shows the matrices that adapters can sit on, in the same order.
    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>));
}

impl Parameters for Array {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        visit(self);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        visit(self);
    }

    fn each_matrix(&mut self, _: &mut dyn FnMut(Adaptable<'_>)) {}
}

impl<T: Parameters> Parameters for Option<T> {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.iter().for_each(|inner| inner.each(visit));
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.iter_mut().for_each(|inner| inner.each_mut(visit));
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        self.iter_mut().for_each(|inner| inner.each_matrix(visit));
    }
}

impl<T: Parameters> Parameters for Box<T> {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        (**self).each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        (**self).each_mut(visit);
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        (**self).each_matrix(visit);
    }
}

impl<T: Parameters> Parameters for Vec<T> {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.iter().for_each(|inner| inner.each(visit));
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.iter_mut().for_each(|inner| inner.each_mut(visit));
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        self.iter_mut().for_each(|inner| inner.each_matrix(visit));
    }
}

/// `parameters!(Mlp: gate, up, down);` implements [`Parameters`] for a struct by these fields, in this order.
macro_rules! parameters {
    ($type:ident: $($field:ident),+ $(,)?) => {
        impl $crate::parameters::Parameters for $type {
            fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a mlx_rs::Array)) {
                $($crate::parameters::Parameters::each(&self.$field, visit);)+
            }

            fn each_mut(&mut self, visit: &mut dyn FnMut(&mut mlx_rs::Array)) {
                $($crate::parameters::Parameters::each_mut(&mut self.$field, visit);)+
            }

            fn each_matrix(&mut self, visit: &mut dyn FnMut($crate::served::Adaptable<'_>)) {
                $($crate::parameters::Parameters::each_matrix(&mut self.$field, visit);)+
            }
        }
    };
}
pub(crate) use parameters;

#[cfg(test)]
mod tests {
    use super::*;

    struct Pair {
        one: Array,
        none: Option<Array>,
        many: Vec<Array>,
    }
    parameters!(Pair: many, one, none);

    #[test]
    fn order_is_that_of_the_list() {
        let mut pair = Pair { one: Array::from_int(3), none: None, many: vec![Array::from_int(1), Array::from_int(2)] };
        let mut next = 10;
        pair.each_mut(&mut |array| {
            *array = Array::from_int(array.item_exact::<i32>() + next);
            next += 10;
        });
        let mut seen = Vec::new();
        pair.each(&mut |array| seen.push(array.item_exact::<i32>()));
        assert_eq!(seen, [11, 22, 33]);
    }
}
