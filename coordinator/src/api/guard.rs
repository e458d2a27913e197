//! Keeps web pages out: a page in the user's browser may reach this port, under a name of its own choosing too (DNS rebinding).

use super::error::{ApiError, shown};
use axum::http::{HeaderMap, Uri, header};

/// What a server allows, by the address that it listens on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guard {
    /// Bound to loopback: then only names of loopback are right.
    pub(super) loopback: bool,
}

impl Guard {
    /// Refuses a Host that is not ours and an Origin that is foreign.
    pub(super) fn check(self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else { return Err(ApiError::BadHost) };
        let host = host.to_str().map_err(|_| ApiError::BadHost)?;
        let asked = uri.authority().map(|authority| authority.as_str());
        for name in [Some(host), asked].into_iter().flatten() {
            if self.loopback && !is_loopback(name) {
                return Err(ApiError::WrongHost { host: shown(name) });
            }
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return self.check_fetch_site(headers) };
        let text = String::from_utf8_lossy(origin.as_bytes());
        let authority = text.split_once("://").map(|(_, authority)| authority).unwrap_or_default();
        let own = authority.eq_ignore_ascii_case(host) || (self.loopback && is_loopback(authority));
        if own && !authority.is_empty() { Ok(()) } else { Err(ApiError::ForeignOrigin { origin: shown(&text) }) }
    }

    /// Browsers say so when a request comes from another site, also where they leave the Origin out.
    fn check_fetch_site(self, headers: &HeaderMap) -> Result<(), ApiError> {
        match headers.get("sec-fetch-site") {
            Some(site) if site == "cross-site" => Err(ApiError::ForeignOrigin { origin: "another site".into() }),
            _ => Ok(()),
        }
    }
}

/// Whether `host[:port]` is a name of this machine that no other can take.
fn is_loopback(authority: &str) -> bool {
    let name = match authority.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => authority,
    };
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|own| name.eq_ignore_ascii_case(own))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderName;

    fn check(loopback: bool, uri: &str, headers: &[(&str, &str)]) -> Option<u16> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name.parse::<HeaderName>().expect("a name"), value.parse().expect("a value"));
        }
        Guard { loopback }.check(&uri.parse().expect("a path"), &map).err().map(|error| error.status().as_u16())
    }

    #[test]
    fn only_names_of_loopback_reach_a_loopback_server() {
        for host in ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8080", "[::1]"] {
            assert_eq!(check(true, "/", &[("host", host)]), None, "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "localhost:80@evil", "::1", ""] {
            assert_eq!(check(true, "/", &[("host", host)]), Some(421), "{host}");
        }
        assert_eq!(check(true, "http://evil.example/", &[("host", "localhost")]), Some(421));
        assert_eq!(check(true, "/", &[]), Some(400));
        assert_eq!(check(true, "/", &[("host", "localhost"), ("host", "localhost")]), Some(400));
        assert_eq!(check(false, "/", &[("host", "mac.local:8080")]), None);
    }

    #[test]
    fn foreign_pages_are_refused() {
        let with_origin = |loopback, host: &str, origin: &str| check(loopback, "/", &[("host", host), ("origin", origin)]);
        assert_eq!(with_origin(true, "localhost:80", "http://localhost:3000"), None);
        assert_eq!(with_origin(true, "localhost:80", "https://evil.example"), Some(403));
        assert_eq!(with_origin(true, "localhost:80", "null"), Some(403));
        assert_eq!(with_origin(false, "mac.local:80", "http://mac.local:80"), None);
        assert_eq!(with_origin(false, "mac.local:80", "http://localhost"), Some(403));
        assert_eq!(with_origin(false, "mac.local:80", "file://"), Some(403));
        assert_eq!(check(true, "/", &[("host", "localhost"), ("sec-fetch-site", "cross-site")]), Some(403));
        assert_eq!(check(true, "/", &[("host", "localhost"), ("sec-fetch-site", "none")]), None);
    }
}
