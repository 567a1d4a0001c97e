//! JSON whose fields stay in the order in which they were written.

use serde::ser::{Serialize, SerializeMap, Serializer};

/// A value of a vector file. Bytes are hexadecimal text.
#[derive(Clone)]
pub enum Json {
    /// `null`
    Nothing,
    /// A flag.
    Flag(bool),
    /// A number.
    Number(u64),
    /// A text, or bytes in hexadecimal.
    Text(String),
    /// A list.
    List(Vec<Self>),
    /// Fields in their order.
    Fields(Fields),
}

/// Named values in their order.
#[derive(Clone, Default)]
pub struct Fields(Vec<(String, Json)>);

impl Fields {
    /// No fields yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One field more.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Json>) -> Self {
        self.put(name, value);
        self
    }

    /// One field more.
    pub fn put(&mut self, name: &str, value: impl Into<Json>) {
        assert!(self.0.iter().all(|(other, _)| other != name), "{name} is there already");
        self.0.push((name.into(), value.into()));
    }

    /// One field more: bytes.
    #[must_use]
    pub fn hex(mut self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        self.put_hex(name, bytes);
        self
    }

    /// One field more: bytes.
    pub fn put_hex(&mut self, name: &str, bytes: impl AsRef<[u8]>) {
        self.put(name, hex::encode(bytes));
    }

    /// The fields of `other` behind these.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        for (name, value) in other.0 {
            self.put(&name, value);
        }
        self
    }

    /// The file that has these fields.
    pub fn file(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data") + "\n"
    }
}

impl From<Fields> for Json {
    fn from(fields: Fields) -> Self {
        Self::Fields(fields)
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Json {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Json {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

macro_rules! numbers {
    ($($type:ty)*) => {$(
        impl From<$type> for Json {
            fn from(number: $type) -> Self {
                Self::Number(number.into())
            }
        }
    )*};
}

numbers! { u8 u16 u32 u64 }

impl<T: Into<Self>> From<Vec<T>> for Json {
    fn from(list: Vec<T>) -> Self {
        Self::List(list.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Self>> From<Option<T>> for Json {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Nothing, Into::into)
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nothing => serializer.serialize_unit(),
            Self::Flag(flag) => flag.serialize(serializer),
            Self::Number(number) => number.serialize(serializer),
            Self::Text(text) => text.serialize(serializer),
            Self::List(list) => list.serialize(serializer),
            Self::Fields(fields) => fields.serialize(serializer),
        }
    }
}
